"""Captioned pictures from folders, tables, shards and datasets: one door for all of them."""

import logging
import os
from pathlib import Path
from typing import Any

from latentdiff.training.data.folder import read_beside, split_folder
from latentdiff.training.data.pictures import CaptionedPicture
from latentdiff.training.data.shards import find_shards, read_shards
from latentdiff.training.data.source import NoPicturesError, Source, Wanted
from latentdiff.training.data.survey import leave_out, log_findings, read_manifest, sound_pictures
from latentdiff.training.data.tables import metadata_of, read_metadata
from latentdiff.training.settings import Condition, RunSettings

logger = logging.getLogger(__name__)


def load_pictures(source: str, split: str = "train", **options: Any) -> list[CaptionedPicture]:
    """The captioned pictures of `source`. Entries that cannot be used are logged by name; `read_source` gives them too.

    Args:
        source: one of

            - a folder with ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``: ``file_name``, the caption
              column (a string, or but for CSV a list of them), and optionally ``weight`` and ``split``;
            - a folder with a ``.txt`` or ``.caption`` file beside each picture;
            - WebDataset shards: a folder of ``.tar`` files, one such file, or a pattern such as
              ``shards/{000..099}.tar``;
            - a folder written by ``datasets.save_to_disk``, or a name for ``datasets.load_dataset``.

            A folder may instead have one folder for each split, named like it.
        split: rows and folders without a split are of "train".
        options: further fields of `Wanted`.

    Raises:
        FileNotFoundError: there is no such source, or it has no usable picture of this split.
        ValueError: a table cannot be read as a whole, or lacks a column.
    """
    return _usable(read_source(source, Wanted(split=split, **options)), source)


def from_dataset(dataset: Any, name: str = "dataset", **options: Any) -> list[CaptionedPicture]:
    """Captioned pictures of a `datasets.Dataset`, or of an `IterableDataset`, which is read once into a copy.

    Args:
        options: fields of `Wanted`.

    Raises:
        ValueError: there is no such column.
        FileNotFoundError: it has no usable picture.
    """
    from latentdiff.training.data.hf_datasets import from_rows

    return _usable(from_rows(dataset, name, Wanted(**options)), name)


def _usable(found: Source, name: str) -> list[CaptionedPicture]:
    log_findings(found.refused, "left out")
    if not found.pictures:
        first = f"; the first fault: {found.refused[0].name}: {found.refused[0].reason}" if found.refused else ""
        raise NoPicturesError(f"{name}: not one usable picture{first}")
    return found.pictures


def read_source(source: str, wanted: Wanted) -> Source:
    """The pictures of `source`, and what is wrong with those that cannot be used; see `load_pictures`.

    Raises:
        NoPicturesError: there is nothing, neither usable nor unusable.
    """
    found = _read(source, wanted)
    if not found.pictures and not found.refused:
        raise NoPicturesError(f"{source}: no captioned pictures found (split {wanted.split!r})")
    logger.info("%s: %d pictures", source, len(found.pictures))
    return found


def _read(source: str, wanted: Wanted) -> Source:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, wanted)
    shards = find_shards(source)
    if shards:
        return read_shards(shards, wanted)
    if os.path.isabs(folder) or source.startswith(".") or folder.exists():
        raise FileNotFoundError(f"{source}: not a folder; --data takes a folder of pictures, shards or a dataset name")
    from latentdiff.training.data.hf_datasets import read_dataset

    return read_dataset(source, wanted)


def _read_folder(folder: Path, wanted: Wanted) -> Source:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        from latentdiff.training.data.hf_datasets import read_dataset

        return read_dataset(str(folder), wanted)
    whole, folder = folder, split_folder(folder, wanted.split)
    metadata = metadata_of(folder)
    if metadata is not None:
        return read_metadata(folder, metadata, wanted, whole)
    shards = find_shards(str(folder))
    if shards:
        return read_shards(shards, wanted, whole)
    found = read_beside(folder, wanted, whole)
    if not found.pictures and not found.refused and any(folder.rglob("*.parquet")):
        from latentdiff.training.data.hf_datasets import read_dataset

        return read_dataset(str(folder), wanted)
    return found


def prepare_pictures(
    settings: RunSettings, split: str | None = None, condition: Condition = "text"
) -> list[CaptionedPicture]:
    """The usable pictures of ``settings.data``, each decoded once, with digest and size; always in the same order.

    What was found is kept in ``manifest-SPLIT.jsonl`` in the run's ``training/`` folder, so that a repeated run looks
    only at what changed. Pictures that cannot be used are counted and named, and left out. Those that
    ``settings.manifest`` says to leave out are left out too, and do not count as bad.

    Args:
        split: by default ``settings.split``.
        condition: what captions are for; with "none" every picture has the caption "".

    Raises:
        FileNotFoundError: there is no such source, split or manifest, or nothing in it can be used.
        ValueError: more than ``settings.max_bad_share`` of the pictures are unusable.
    """
    folder = Path(settings.output) / "training"
    cache_dir = Path(settings.cache_dir or folder) / "stream"
    wanted = Wanted.of(settings, split, condition=condition, cache_dir=cache_dir)
    source = read_source(settings.data, wanted)
    if settings.manifest is not None:
        leave_out(source, read_manifest(Path(settings.manifest).expanduser()))
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in wanted.split)[:60] or "all"
    about = {"data": settings.data, "split": wanted.split}
    good, refused = sound_pictures(source, folder / f"manifest-{name}.jsonl", about, settings.max_bad_share)
    logger.info("%s (%s): %d pictures, %d left out", settings.data, wanted.split, len(good), len(refused))
    return good
