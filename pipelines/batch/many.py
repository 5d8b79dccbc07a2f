"""Many prompts to a folder of pictures: in batches, over several processes, continuing an interrupted run."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.fingerprint import plain_json, weights_digest
from latentdiff.interchange.png import read_settings, save_picture
from latentdiff.interchange.user_files import check_regular
from latentdiff.pipelines.batch.draw import (
    SourcePictures,
    check_seeds,
    draw_batch,
    refiner_of,
    settings_of,
    this_machine,
)
from latentdiff.pipelines.batch.drawing_options import BATCH, MOST, NOT_FINITE, RowOptions, defaults_of
from latentdiff.pipelines.batch.effects import check_effects_on_each
from latentdiff.pipelines.batch.prompt_files import Prompt, check_row, name_files, same_file
from latentdiff.pipelines.batch.record import Batch, Settings, record_of
from latentdiff.pipelines.core.call_options import whole_number
from latentdiff.pipelines.distributed import drawing_processes

PASSING = ("batches", "pictures", "machine", "version", "withheld", "model")
"""What of a record does not say which picture it is."""

TABLE = "metadata.jsonl"
"""Of a folder of drawn pictures, as `datasets`' imagefolder and training read it."""
OTHER_TABLES = ("metadata.csv", "metadata.parquet")  # what is read in its place
MARK = "model_digest"
"""A column that others' tables do not have."""

ABOUT_A_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.ELOOP)
"""Errors of one file that say nothing about the others, as a full disk does."""

ProgressCallback = Callable[[int, int], None]
"""(done, total)"""


@dataclass(frozen=True)
class PlannedPicture:
    """One picture: its file, and what to draw."""

    name: str
    prompt: str
    seed: int
    settings: Settings

    def is_in(self, found: Mapping[str, Any]) -> bool:
        """Whether the settings found in a file are those of this picture."""
        own = self.settings.model_dump(mode="json", exclude_defaults=True)
        own |= {"prompts": [self.prompt], "count": 1, "seed": self.seed}
        return all(own.get(key) == found.get(key) for key in {*own, *found} - {*PASSING})

    def row(self) -> dict[str, Any]:
        """Of the folder's table."""
        names = (*defaults_of(RowOptions), "model", MARK)
        shared = {name: getattr(self.settings, name) for name in names}
        return {"file_name": self.name, "text": self.prompt, "seed": self.seed, **shared}


@dataclass
class Report:
    """What `draw_many` did, all processes together; file names within ``folder``.

    ``drawn``: in this run. ``kept``: were there before. ``failed``: what went wrong. ``withheld``: made black by the
    model's safety checker; they are not in the folder's table.
    """

    folder: Path
    drawn: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    withheld: list[str] = field(default_factory=list)


def draw_many(
    pipeline: Any,
    prompts: Iterable[str | Mapping[str, Any] | Prompt],
    folder: str | Path,
    *,
    seed: int = 0,
    batch_size: int = BATCH,
    model: str | None = None,
    model_digest: str | None = None,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Report:
    """Draw a picture of each prompt into `folder`, a PNG with its settings, and a table of them, ``metadata.jsonl``.

    ::

        draw_many(pipeline, ["a red car", {"prompt": "a blue fish", "guidance_scale": 5.0}], "pictures")

    Called again it draws only what is missing, or was drawn with other settings or another model. With several
    processes (torchrun, ``accelerate launch``), all of which must make this call, each draws a part. Picture i has the
    seed ``seed + i``, whatever its batch and process. What fails is reported and does not stop the rest. The folder
    with its table is an ``imagefolder`` for the `datasets` library, and data for training.

    Args:
        pipeline: on its device; one that draws from words, of classes, or without either.
        prompts: texts, or mappings with the keys of `prompt_files.Prompt`; or classes in their place. For a pipeline
            without either, ``Prompt(prompt="")`` for each picture.
        batch_size: prompts with equal settings that are drawn at once. It changes the last bits of pictures.
        model, model_digest: its name, and a digest that identifies it (see `interchange.fingerprint`), for the files;
            by default where the pipeline was loaded from, and a digest of the weights in memory.
        progress: called as ``progress(done, total)`` after each batch, with this process's numbers of pictures.
        settings: of all pictures whose prompts do not say otherwise, what `RefinedOptions` has; and for
            the files only ``loras``, ``embeddings``, ``variant`` and ``refiner_digest``. ``refiner``, a name, and
            ``denoising_end`` let the pipeline's ``refiner`` draw the last steps.

    Raises:
        TypeError: ``seed`` or ``batch_size`` is no whole number.
        ValueError: a prompt or a setting cannot be used, a file name leaves the folder, or a refiner is named and the
            pipeline has none.
        FileExistsError: a file in the way is not a picture of ours, or the table is not ours; nothing is drawn.
        OSError: the folder cannot be written.
    """
    seed, batch_size = whole_number(seed, "seed"), whole_number(batch_size, "batch_size")
    if not 1 <= batch_size <= MOST:
        raise ValueError(f"batch_size must lie in [1, {MOST}], not {batch_size}")
    folder = Path(folder)
    name = model or str(getattr(pipeline, "name_or_path", "") or "unknown")
    digest = model_digest or digest_of_weights(pipeline)
    common = settings_of(pipeline, name, {**settings, "model_digest": digest})
    if common.refiner is not None and common.refiner_digest is None:
        common = common.model_copy(update={"refiner_digest": digest_of_weights(refiner_of(pipeline, common))})
    pictures = plan_pictures(prompts, common, seed)
    check_effects_on_each(pipeline, common, [picture.settings for picture in pictures])
    folder.mkdir(parents=True, exist_ok=True)
    there, failed = look_around(folder, pictures)
    state = drawing_processes(cpu=pipeline.device.type == "cpu")
    report = Report(folder, kept=[picture.name for picture in pictures if picture.name in there], failed=failed)
    report.withheld = [name for name, found in there.items() if found.get("withheld")]
    done = {*there, *failed}
    batches = make_batches(pictures, batch_size)
    missing = [batch for batch in batches if any(picture.name not in done for picture in batch)]
    index, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    if state is not None:
        state.wait_for_everyone()  # all have looked before any writes
    draw_batches(pipeline, missing[index::count], done, report, progress)
    if state is not None:
        gather(report)
    if index == 0:
        left_out = {*report.failed, *report.withheld}
        write_table(folder, [picture.row() for picture in pictures if picture.name not in left_out])
    return report


def is_drawn(
    pipeline: Any, prompts: Iterable[Prompt], folder: Path, *, seed: int, model: str, model_digest: str, **settings: Any
) -> bool:
    """Whether `draw_many`, called with the same arguments, would find every picture there.

    Args:
        pipeline: may be without weights, see `outline`.
    """
    if not folder.is_dir():
        return False
    common = settings_of(pipeline, model, {**settings, "model_digest": model_digest})
    pictures = plan_pictures(prompts, common, seed)
    return len(look_around(folder, pictures)[0]) == len(pictures)


# What to draw


def plan_pictures(
    prompts: Iterable[str | Mapping[str, Any] | Prompt], common: Settings, seed: int
) -> list[PlannedPicture]:
    """Raises ValueError for a prompt that cannot be used, and if there are none."""
    rows = [as_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts, 1)]
    if not rows:
        raise ValueError("there are no prompts")
    check_seeds(seed, len(rows))
    pictures = []
    for i, (row, name) in enumerate(zip(rows, name_files(rows), strict=True)):
        own = row.model_dump(exclude={"prompt", "seed", "file_name"}, exclude_none=True)
        settings = common.model_copy(update=own) if own else common
        pictures.append(PlannedPicture(name, row.prompt, seed + i if row.seed is None else row.seed, settings))
    return pictures


def as_prompt(value: str | Mapping[str, Any] | Prompt, where: str) -> Prompt:
    if isinstance(value, Prompt):
        return value
    if not isinstance(value, str | Mapping):
        raise TypeError(f"{where}: a text or a mapping is expected, not a {type(value).__name__}")
    return check_row({"prompt": value} if isinstance(value, str) else value, where)


def look_around(folder: Path, pictures: Sequence[PlannedPicture]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What in `folder` need not be drawn, the settings in the file of each such picture; and what cannot be written,
    with the reason.

    Raises:
        ValueError: a file name leads out of the folder, by a link.
        FileExistsError: something there is not ours.
    """
    for name in OTHER_TABLES:
        if os.path.lexists(folder / name):
            raise FileExistsError(f"{folder / name}: this folder has a table of its own; choose another folder")
    read_table(folder)
    root = folder.resolve()
    names = {same_file(picture.name): picture.name for picture in pictures}
    there, failed = {}, {}
    for picture in pictures:
        file = folder / picture.name
        above = [same_file(str(one)) for one in PurePosixPath(picture.name).parents]
        within = [names[one] for one in above if one in names]
        try:
            if within:
                raise NotADirectoryError(f"{within[0]} is a picture of this table, and cannot be a folder too")
            if not file.parent.resolve().is_relative_to(root):
                raise ValueError(f"file_name {picture.name!r} leads out of {folder}")
            found = read_settings(file) if stat.S_ISREG(file.lstat().st_mode) else None
        except FileNotFoundError:
            continue
        except (OSError, RuntimeError) as error:  # the latter for links in a circle
            failed[picture.name] = describe(error)
            continue
        if found is None:
            raise FileExistsError(f"{file} exists and was not drawn by latentdiff; move it, or choose another folder")
        if picture.is_in(found):
            there[picture.name] = found
    return there, failed


def make_batches(pictures: Sequence[PlannedPicture], size: int) -> Iterator[list[PlannedPicture]]:
    """Pictures with the same settings, in their order. They do not depend on what has been drawn already: the last bits
    of a picture depend on its batch.
    """
    groups: dict[str, list[PlannedPicture]] = {}
    for picture in pictures:
        groups.setdefault(picture.settings.model_dump_json(), []).append(picture)
    for group in groups.values():
        for i in range(0, len(group), size):
            yield group[i : i + size]


# Drawing


def draw_batches(
    pipeline: Any,
    batches: Sequence[Sequence[PlannedPicture]],
    done: set[str],
    report: Report,
    progress: ProgressCallback | None,
) -> None:
    """Draw this process's part; what is `done` is drawn with its batch, but not written again."""
    total = sum(picture.name not in done for batch in batches for picture in batch)
    for batch in batches:
        alone = [[picture] for picture in batch] if len(batch) > 1 else []
        for part in (batch, *alone):  # one after the other, if they do not go together
            if all(picture.name in done for picture in part):
                continue
            try:
                draw_and_write(pipeline, part, done, report)
            except (ValueError, TypeError, RuntimeError) as error:
                if len(part) == 1:
                    report.failed[part[0].name] = describe(error)
        if progress is not None:
            progress(len(report.drawn) + len(report.failed), total)


def describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, ValueError | TypeError | OSError) and text else f"{type(error).__name__}: {text}"


def draw_and_write(pipeline: Any, pictures: Sequence[PlannedPicture], done: set[str], report: Report) -> None:
    """Draw a batch, and write what of it is missing."""
    settings = pictures[0].settings
    batch = Batch(prompts=[picture.prompt for picture in pictures], seeds=[picture.seed for picture in pictures])
    drawn = draw_batch(pipeline, settings, batch, SourcePictures())
    machine = this_machine(pipeline)
    for picture, one in zip(pictures, drawn, strict=True):
        if picture.name in done:
            continue
        done.add(picture.name)
        if one.spoilt:
            report.failed[picture.name] = f"not written, {NOT_FINITE}"
            continue
        try:
            save_picture(one.image, report.folder / picture.name, record_of(settings, [batch], [one], machine).dump())
        except OSError as error:
            if error.errno not in ABOUT_A_NAME:
                raise
            report.failed[picture.name] = describe(error)
            continue
        report.drawn.append(picture.name)
        if one.withheld:
            report.withheld.append(picture.name)


def gather(report: Report) -> None:
    """Make every process's report that of all."""
    from accelerate.utils import gather_object

    for drawn, failed, withheld in gather_object([(report.drawn, report.failed, report.withheld)]):
        report.drawn += [name for name in drawn if name not in report.drawn]
        report.failed |= failed
        report.withheld += [name for name in withheld if name not in report.withheld]


def digest_of_weights(pipeline: Any) -> str:
    """Identifies a pipeline in memory: SHA-256 of its networks' weights and its components' configs."""
    whole = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        config = getattr(part, "config", None)
        if config is not None:
            values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            whole.update(f"{name} ".encode() + plain_json(json.dumps(values, default=str).encode()))
        if hasattr(part, "state_dict"):
            whole.update(weights_digest(part.state_dict()).encode())
    return f"weights:{whole.hexdigest()}"


# The table


def read_table(folder: Path) -> list[dict[str, Any]]:
    """The rows of a table that this program wrote; none if there is no table.

    Raises:
        FileExistsError: there is one that it did not write.
    """
    file = folder / TABLE
    if not os.path.lexists(file):
        return []
    rows: list[Any]
    try:
        check_regular(file)
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError):
        rows = [None]
    if not all(isinstance(row, dict) and {MARK, "file_name"} <= row.keys() for row in rows):
        raise FileExistsError(f"{file} exists and was not written by latentdiff; move it, or choose another folder")
    return rows


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table, whole or not at all; rows of pictures that are there from earlier stay. Without rows, none."""
    new = {row["file_name"] for row in rows}

    def stays(name: Any) -> bool:
        return isinstance(name, str) and name not in new and (folder / name).is_file()

    old = [row for row in read_table(folder) if stays(row["file_name"])]
    if not old and not rows:
        (folder / TABLE).unlink(missing_ok=True)
        return
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in [*old, *rows])
    write_text_whole(folder / TABLE, "".join(lines))
