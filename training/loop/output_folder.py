"""A run's output folder: one process at a time trains into it, and only with settings that fit what it holds."""

import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from latentdiff.interchange.locks import NO_LOCKS, TAKEN, lock
from latentdiff.pipelines.distributed import processes
from latentdiff.training.loop.checkpoints import FORMAT, read_state, whole_checkpoints
from latentdiff.training.loop.distributed import check_surroundings
from latentdiff.training.loop.power_averages import AVERAGES
from latentdiff.training.settings import RunSettings
from latentdiff.training.settings.run import PATHS

logger = logging.getLogger(__name__)

LOCK = ".lock"
LEFTOVER = re.compile(r"\.saving-\w{8}|\.partial-[0-9a-f]{16}(\.\w+)?")
"""What a killed process leaves of a folder or a file that it was writing aside."""
ACTING_LATER = frozenset(
    (
        *("max_steps", "max_minutes", "push_to_hub", "report_to", "cache_dir", "cache_latents", "cache_text", "data"),
        *("picture_folder", "manifest", "num_workers", "compile", "gradient_checkpointing", "keep_checkpoints"),
        *("checkpoint_every", "sample_every", "log_every", "sample_prompts", "sample_steps", "sample_guidance_scale"),
        *("sample_classifier_scale", "extractor", "latent_shift", "model", "autoencoder", "text_encoder", "teacher"),
    )
)
"""Settings that say something still where all steps are made: of the end, or, as models, compared by content."""
_held: dict[Path, BinaryIO] = {}
"""Open lock files by folder."""


def open_output(settings: RunSettings, given: Mapping[str, str] | None = None, unsettled: Collection[str] = ()) -> None:
    """What a trainer does before it loads or writes anything: see that the settings can be trained with, and here.

    A folder that holds a run is this process's from now on, and what killed processes left there is removed; a dry run
    only looks.

    Args:
        given: see `TrainingRun`, as far as it is known yet.
        unsettled: settings that a model will change, so that they say nothing yet.

    Raises:
        ValueError: the folder is none, or that of the pictures, or holds a model that no training made; another process
            trains into it, its run cannot go on with these settings, or this machine lacks what they need.
    """
    check_surroundings(settings)
    folder = Path(settings.output) / "training"
    check_place(Path(settings.output), getattr(settings, "data", ""))
    check_empty(Path(settings.output))
    is_main = processes().is_main_process and not settings.is_dry_run
    if is_main and folder.is_dir():
        hold(folder)
    check_resumable(folder, settings, given or {}, unsettled)
    if is_main:
        remove_leftovers(Path(settings.output))


def check_place(output: Path, data: str) -> None:
    """Raises ValueError for a file in place of a folder, and for the folder of the pictures: the run's own, curves and
    samples, would be among them."""
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file, and no folder to train into; choose another --output")
    if there == output and os.path.isdir(data) and output.samefile(data):
        raise ValueError(
            f"{output} is the folder of the pictures (--data); choose another --output, such as {output / 'model'}"
        )


def check_empty(output: Path) -> None:
    """Raises ValueError if a folder holds a model that no training made, which one would replace."""
    if (output / "training" / "settings.yaml").exists():
        return
    for file, what in (("model_index.json", "a pipeline"), ("config.json", "a model")):
        if (output / file).exists():
            raise ValueError(f"{output} holds {what} that was not made by training; choose another --output")


def hold(folder: Path) -> None:
    """Lock an existing folder for this process, until `release` or its end, however it ends.

    Raises:
        ValueError: another process holds it; the message says which.
    """
    key = folder.resolve()
    if key in _held:
        return
    file = (folder / LOCK).open("a+b")
    try:
        lock(file)
    except OSError as error:
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip() or "another process"
        file.close()
        if error.errno in TAKEN:
            raise ValueError(
                f"{folder.parent} is being trained into by {holder}. Wait for its end, stop it (it saves what it has), "
                f"or choose another --output"
            ) from None
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: its file system has no locks; let no second run write there (%s)", folder, error.strerror)
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}".encode())
    file.flush()
    _held[key] = file


def release(folder: Path) -> None:
    """Let other processes train into a folder that this one holds."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        file.truncate(0)
        file.close()


def hold_nothing() -> None:
    """For a process that was forked from this one, such as a data loader's, which may outlive it for seconds."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=hold_nothing)


def check_resumable(
    folder: Path, settings: RunSettings, given: Mapping[str, str], unsettled: Collection[str] = ()
) -> None:
    """Raises ValueError if `folder` holds a run that cannot go on with these settings, and with what is given.

    Another network, process or order of pictures would be trained; or the run is beyond `max_steps` already.
    """
    whole = whole_checkpoints(folder / "checkpoints")
    if not whole:
        return
    state = read_state(whole)
    before = state["settings"]
    fixed = set(settings.fixed) - set(unsettled)
    wrong = [f"{key} was {old!r}, now {new!r}" for key, old, new in changes(before, settings) if key in fixed]
    wrong += [f"another {name} than before" for name, digest in given.items() if state["given"].get(name) != digest]
    if before["trainer"] != type(settings).__name__:
        theirs, ours = typed_as(before["trainer"]), typed_as(type(settings).__name__)
        raise ValueError(
            f"{settings.output} holds a run of {theirs}, which {ours} does not go on with; choose another --output. "
            f"Nothing was changed"
        )
    if wrong:
        raise ValueError(
            f"{whole[-1]}: the run there was begun otherwise ({'; '.join(wrong)}), and does not go on with that; "
            f"repeat it as it was, or begin a new one in another --output"
        )
    weights = [(old, new) for key, old, new in changes(before, settings) if key == "kl_weight"]
    if weights and state["format"] < FORMAT:
        old, new = weights[0]
        raise ValueError(
            f"{whole[-1]}: the run there was begun when kl_weight stood beside a mean over pixels. Now it stands "
            f"beside a sum, as Latent Diffusion's, so kl_weight={old} goes on with the run as it was, and "
            f"kl_weight={new} would be another training; give the first, or begin a new run in another --output"
        )
    if "max_steps" not in unsettled and int(state["step"]) > settings.max_steps:
        raise ValueError(
            f"{settings.output}: the run is at step {state['step']} already, so with max_steps={settings.max_steps} "
            f"there is nothing to do; a larger max_steps trains on. Nothing was changed"
        )


def typed_as(trainer: str) -> str:
    """The command of a trainer, by the name of its settings; that name where it is no command of ours."""
    from latentdiff.training.commands.settings import Kind, full_name, settings_of

    commands = {settings_of(kind).__name__: f"'latentdiff {full_name(kind)}'" for kind in Kind}
    return commands.get(trainer, trainer)


def log_changes(state: Mapping[str, Any], settings: RunSettings) -> list[dict[str, Any]]:
    """Say in what the settings differ from those of a checkpoint's state; returns it for the run's history.

    Raises:
        ValueError: some would change how it learns, and there is no step left to learn in.
    """
    found, step = changes(state["settings"], settings, state.get("places", {})), int(state["step"])
    idle = [f"{key} {new!r} (was {old!r})" for key, old, new in found if key not in ACTING_LATER]
    if idle and step >= settings.max_steps:
        raise ValueError(
            f"{settings.output}: the run is at step {step}, which is all of max_steps, so nothing would be trained "
            f"with {', '.join(idle)}; a larger max_steps trains on with that. Nothing was changed"
        )
    said = [f"{key} {new!r} (was {old!r})" for key, old, new in found]
    if said:
        logger.info("the run goes on with other settings than before: %s", ", ".join(said))
    when = time.strftime("%Y-%m-%d %H:%M")
    return [{"when": when, "step": step, "setting": key, "old": old, "new": new} for key, old, new in found]


def changes(
    before: Mapping[str, object], settings: RunSettings, places: Mapping[str, str] | None = None
) -> list[tuple[str, object, object]]:
    """Key, old and new value of what differs from the settings of a checkpoint; it may lack those that are newer.

    places: of its paths, see `places_of`: a path that is written otherwise and leads to the same place is no change.
    """
    now = state_of(settings)
    there, here = {**places_of(before), **(places or {})}, places_of(now)
    same = {key for key, place in here.items() if there.get(key) == place}
    return [(k, before[k], value) for k, value in now.items() if before.get(k, value) != value and k not in same]


def places_of(values: Mapping[str, object]) -> dict[str, str]:
    """Where the paths among settings lead, of those that there are."""
    from latentdiff.interchange.folders import packaged_models

    paths = {key: value for key, value in values.items() if key in PATHS and isinstance(value, str) and value}
    found = {key: Path(value).expanduser() for key, value in paths.items() if value not in packaged_models()}
    return {key: str(path.resolve()) for key, path in found.items() if path.exists()}


def given_before(output: Path, kind: type[RunSettings]) -> dict[str, Any]:
    """What the run in `output` was given, as defaults for going on with it; nothing if there is none of this kind.

    Its time limit is not among it, for that is of one sitting. A relative path that leads elsewhere from here is whole.

    Raises:
        ValueError: see `read_state`.
    """
    whole = whole_checkpoints(output.expanduser() / "training" / "checkpoints")
    state = read_state(whole) if whole else {"settings": {}}
    before, usual = state["settings"], kind.model_fields
    if before.get("trainer") != kind.__name__:
        return {}
    places, here = state.get("places", {}), places_of(before)
    given = state.get("chosen", [key for key in usual if not is_usual(kind, key, before.get(key))])
    values = {key: before[key] for key in given if key in usual and key in before and key != "max_minutes"}
    return {key: value if here.get(key) == places.get(key) else places.get(key, value) for key, value in values.items()}


def state_of(settings: RunSettings) -> dict[str, object]:
    """Settings as a checkpoint keeps them: without its place, with the name of their class."""
    return {"trainer": type(settings).__name__, **json.loads(settings.model_dump_json(exclude={"output"}))}


def is_usual(kind: type[RunSettings], key: str, value: object) -> bool:
    """Whether a setting from a checkpoint has its default."""
    return (tuple(value) if isinstance(value, list) else value) == kind.model_fields[key].default


def remove_leftovers(output: Path) -> None:
    """Remove what processes that were killed left half-written in a run's folders."""
    own = output / "training"
    for folder in (output, own, own / "samples", own / AVERAGES):
        for path in folder.glob(".*"):
            if not LEFTOVER.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
