"""Many prompts to a folder of pictures: in batches, over several processes, continuing an interrupted run."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latentdiff import __version__
from latentdiff.interchange.fingerprint import plain_json, weights_digest
from latentdiff.interchange.png import read_settings, save_picture
from latentdiff.pipelines.batch.drawing import SourcePictures, draw_batch, this_machine
from latentdiff.pipelines.batch.options import RowOptions, defaults_of
from latentdiff.pipelines.batch.picture_table import MARK, check_table, write_table
from latentdiff.pipelines.batch.prompt_files import Prompt, check_row, name_files
from latentdiff.pipelines.batch.record import MOST, Batch, Settings, record_of

BATCH = 8
LONG = timedelta(days=7)  # processes may end far apart
PASSING = ("batches", "pictures", "machine", "version", "withheld", "model")
"""What of a record does not say which picture it is."""

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
        pipeline: a `TextToImagePipeline`, on its device.
        prompts: texts, or mappings with the keys of `prompt_files.Prompt`.
        batch_size: prompts with equal settings that are drawn at once. It changes the last bits of pictures.
        model, model_digest: its name, and a digest that identifies it (see `interchange.fingerprint`), for the files;
            by default where the pipeline was loaded from, and a digest of the weights in memory.
        progress: called as ``progress(done, total)`` after each batch, with this process's numbers of pictures.
        settings: of all pictures whose prompts do not say otherwise, the options in `options.DrawingOptions`; and for
            the files only ``loras``, ``embeddings`` and ``variant``.

    Raises:
        ValueError: a prompt or a setting cannot be used, or a file name leaves the folder.
        FileExistsError: a file in the way is not a picture of ours, or the table is not ours; nothing is drawn.
        OSError: the folder cannot be written.
    """
    if not 1 <= batch_size <= MOST:
        raise ValueError(f"batch_size must lie in [1, {MOST}], not {batch_size}")
    folder = Path(folder)
    common = common_settings(pipeline, model, model_digest or digest_of_weights(pipeline), settings)
    pictures = plan_pictures(prompts, common, seed)
    there = look_around(folder, pictures)
    state = several_processes(pipeline)
    report = Report(folder, kept=[picture.name for picture in pictures if picture.name in there])
    report.withheld = [name for name, found in there.items() if found.get("withheld")]
    missing = [
        batch for batch in make_batches(pictures, batch_size) if any(picture.name not in there for picture in batch)
    ]
    index, count = (0, 1) if state is None else (state.process_index, state.num_processes)
    if state is not None:
        state.wait_for_everyone()  # all have looked before any writes
    draw_batches(pipeline, missing[index::count], there, report, progress)
    if state is not None:
        gather(report)
    if index == 0:
        left_out = {*report.failed, *report.withheld}
        write_table(folder, [picture.row() for picture in pictures if picture.name not in left_out])
    return report


def common_settings(pipeline: Any, model: str | None, digest: str, settings: Mapping[str, Any]) -> Settings:
    """The settings of pictures whose prompts have none.

    Raises:
        ValueError: an unknown name or a wrong value.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    height, width = pipeline.picture_size(given.get("height"), given.get("width"))
    values = {
        "negative_prompt": None,
        **pipeline.defaults,
        **given,
        "model": model or str(getattr(pipeline, "name_or_path", "") or "unknown"),
        "model_digest": digest,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "height": height,
        "width": width,
        "version": __version__,
    }
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from None


def plan_pictures(
    prompts: Iterable[str | Mapping[str, Any] | Prompt], common: Settings, seed: int
) -> list[PlannedPicture]:
    """Raises ValueError for a prompt that cannot be used, and if there are none."""
    rows = [as_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts, 1)]
    if not rows:
        raise ValueError("there are no prompts")
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


def look_around(folder: Path, pictures: Sequence[PlannedPicture]) -> dict[str, dict[str, Any]]:
    """What in `folder` need not be drawn: the settings in the file of each such picture.

    Raises:
        ValueError: a file name leads out of the folder, by a link.
        FileExistsError: something there is not ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_table(folder)
    root = folder.resolve()
    there = {}
    for picture in pictures:
        file = folder / picture.name
        if not file.parent.resolve().is_relative_to(root):
            raise ValueError(f"file_name {picture.name!r} leads out of {folder}")
        if not os.path.lexists(file):
            continue
        found = None if file.is_symlink() else read_settings(file)
        if found is None:
            raise FileExistsError(f"{file} exists and was not drawn by latentdiff; move it, or choose another folder")
        if picture.is_in(found):
            there[picture.name] = found
    return there


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


def draw_batches(
    pipeline: Any,
    batches: Sequence[Sequence[PlannedPicture]],
    there: Mapping[str, Any],
    report: Report,
    progress: ProgressCallback | None,
) -> None:
    """Draw this process's part; what is `there` is drawn with its batch, but not written again."""
    total = sum(picture.name not in there for batch in batches for picture in batch)
    for batch in batches:
        try:
            draw_and_write(pipeline, batch, there, report)
        except (ValueError, TypeError, RuntimeError) as error:
            if len(batch) == 1:
                report.failed[batch[0].name] = describe(error)
        done = {*report.drawn, *report.failed}
        for picture in batch:  # one after the other, if it did not go together
            if picture.name not in there and picture.name not in done:
                try:
                    draw_and_write(pipeline, [picture], there, report)
                except (ValueError, TypeError, RuntimeError) as error:
                    report.failed[picture.name] = describe(error)
        if progress is not None:
            progress(len(report.drawn) + len(report.failed), total)


def describe(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return text if isinstance(error, ValueError | TypeError) and text else f"{type(error).__name__}: {text}"


def draw_and_write(pipeline: Any, pictures: Sequence[PlannedPicture], there: Mapping[str, Any], report: Report) -> None:
    """Draw a batch, and write what of it is missing."""
    settings = pictures[0].settings
    batch = Batch(prompts=[picture.prompt for picture in pictures], seeds=[picture.seed for picture in pictures])
    output = draw_batch(pipeline, settings, batch, SourcePictures())
    flags = output.nsfw_content_detected or [False] * len(pictures)
    machine = this_machine(pipeline)
    for i, (picture, image) in enumerate(zip(pictures, output.images, strict=True)):
        if picture.name in there:
            continue
        withheld = [0] if flags[i] else []
        record = record_of(settings, [batch], [(0, i)], machine, withheld=withheld)
        save_picture(image, report.folder / picture.name, record.dump())
        report.drawn.append(picture.name)
        if withheld:
            report.withheld.append(picture.name)


def several_processes(pipeline: Any) -> Any:
    """Accelerate's view of the processes, if this is one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from latentdiff.pipelines.distributed import processes

    return processes(cpu=pipeline.device.type == "cpu", timeout=LONG)


def gather(report: Report) -> None:
    """Make every process's report that of all."""
    from accelerate.utils import gather_object

    for one in gather_object([(report.drawn, report.failed, report.withheld)]):
        drawn, failed, withheld = one
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
