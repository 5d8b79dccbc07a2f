"""Captioned pictures from folders, tables, shards and datasets: one door for all of them."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import printable
from latentdiff.training.data.folder import metadata_of, read_beside, read_metadata, split_folder
from latentdiff.training.data.pictures import CaptionedPicture
from latentdiff.training.data.shards import find_shards, read_shards
from latentdiff.training.data.source import Finding, NoPicturesError, Source, Wanted
from latentdiff.training.settings import Condition

logger = logging.getLogger(__name__)

NAMED = 20  # findings named in a log or report; the rest are counted


def load_pictures(
    source: str,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    caption: str | None = None,
    streaming: bool = False,
    max_pictures: int | None = None,
    condition: Condition = "text",
    cache_dir: Path | None = None,
) -> list[CaptionedPicture]:
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
        caption: caption of every picture that has none of its own.
        streaming: read a dataset as a stream, once, into a copy below `cache_dir`.
        max_pictures: take this many of the first.
        condition: what captions are for: "text", "class" or "none". Classes may be whole numbers, labels of
            `datasets`, ``.cls`` files in shards, and names of folders, where a picture in a folder without a table has
            no caption beside it. With "none" every picture has the caption "".
        cache_dir: where a stream is copied to; by default where `datasets` keeps its own copies.

    Raises:
        FileNotFoundError: there is no such source, or it has no usable picture of this split.
        ValueError: a table cannot be read as a whole, or lacks a column.
    """
    wanted = Wanted(
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        caption=caption,
        condition=condition,
        streaming=streaming,
        max_pictures=max_pictures,
        cache_dir=cache_dir,
    )
    found = read_source(source, wanted)
    log_findings(found.refused, "left out")
    if not found.pictures:
        raise NoPicturesError(
            f"{source}: not one usable picture; the first fault: {found.refused[0].name}: {found.refused[0].reason}"
        )
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


def log_findings(findings: Sequence[Finding], what: str) -> None:
    """Name the first `NAMED` of `findings` in warnings, and count the rest."""
    for finding in findings[:NAMED]:
        logger.warning("%s: %s: %s", what, printable(finding.name), printable(finding.reason))
    if len(findings) > NAMED:
        logger.warning("%s: %d more", what, len(findings) - NAMED)


def from_dataset(
    dataset: Any,
    name: str = "dataset",
    image_column: str = "image",
    caption_column: str = "text",
    caption: str | None = None,
) -> list[CaptionedPicture]:
    """Captioned pictures of a `datasets.Dataset`, or of an `IterableDataset`, which is read once into a copy.

    Raises:
        ValueError: there is no such column.
        FileNotFoundError: it has no usable picture.
    """
    from latentdiff.training.data.hf_datasets import from_rows

    wanted = Wanted(image_column=image_column, caption_column=caption_column, caption=caption)
    found = from_rows(dataset, name, wanted)
    log_findings(found.refused, "left out")
    if not found.pictures:
        raise NoPicturesError(f"{name}: not one usable picture")
    return found.pictures
