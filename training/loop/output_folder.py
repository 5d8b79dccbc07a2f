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
from latentdiff.training.loop.checkpoints import read_state, whole_checkpoints
from latentdiff.training.loop.distributed import check_surroundings
from latentdiff.training.settings import RunSettings

logger = logging.getLogger(__name__)

LOCK = ".lock"
LEFTOVER = re.compile(r"\.saving-\w{8}|\.partial-[0-9a-f]{16}(\.\w+)?")
"""What a killed process leaves of a folder or a file that it was writing aside."""
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
        ValueError: another process trains into the folder, its run cannot go on with these settings, or this machine
            lacks what they need.
    """
    check_surroundings(settings)
    folder = Path(settings.output) / "training"
    is_main = processes().is_main_process and not settings.is_dry_run
    if is_main and folder.is_dir():
        hold(folder)
    check_resumable(folder, settings, given or {}, unsettled)
    if is_main:
        remove_leftovers(Path(settings.output))


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
        wrong = [f"it was trained by {before['trainer']}, not {type(settings).__name__}"]
    if wrong:
        raise ValueError(
            f"{whole[-1]}: does not fit the model these settings describe; use the settings of that run, or another "
            f"--output ({'; '.join(wrong)})"
        )
    if "max_steps" not in unsettled and int(state["step"]) > settings.max_steps:
        raise ValueError(
            f"{settings.output}: the run is at step {state['step']} already, so with max_steps={settings.max_steps} "
            f"there is nothing to do; a larger max_steps trains on. Nothing was changed"
        )


def log_changes(before: Mapping[str, object], settings: RunSettings, step: int) -> list[dict[str, Any]]:
    """Say in what the settings differ from those of a checkpoint at `step`; returns it for the run's history."""
    found = changes(before, settings)
    said = [f"{key} {new!r} (was {old!r})" for key, old, new in found if key != "max_steps"]
    if said:
        logger.info("the run goes on with other settings than before: %s", ", ".join(said))
    when = time.strftime("%Y-%m-%d %H:%M")
    return [{"when": when, "step": step, "setting": key, "old": old, "new": new} for key, old, new in found]


def changes(before: Mapping[str, object], settings: RunSettings) -> list[tuple[str, object, object]]:
    """Key, old and new value of what differs from the settings of a checkpoint; it may lack those that are newer."""
    now = state_of(settings)
    return [(key, before[key], value) for key, value in now.items() if before.get(key, value) != value]


def state_of(settings: RunSettings) -> dict[str, object]:
    """Settings as a checkpoint keeps them: without its place, with the name of their class."""
    return {"trainer": type(settings).__name__, **json.loads(settings.model_dump_json(exclude={"output"}))}


def remove_leftovers(output: Path) -> None:
    """Remove what processes that were killed left half-written in a run's folders."""
    for folder in (output, output / "training", output / "training" / "samples"):
        for path in folder.glob(".*"):
            if not LEFTOVER.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
