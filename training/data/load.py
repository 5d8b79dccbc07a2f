"""Captioned pictures from folders, tables, shards and datasets: one door for all of them."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from latentdiff.interchange.atomic import json_text, write_text_whole
from latentdiff.interchange.data_places import check_name, folder_like
from latentdiff.interchange.folders import read_json
from latentdiff.training.data.caption_checks import shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture, stamp_of
from latentdiff.training.data.decode import is_picture
from latentdiff.training.data.folder import read_folder
from latentdiff.training.data.hf_datasets import saved_rows
from latentdiff.training.data.large import LargeSurvey, open_table
from latentdiff.training.data.picture_table import PictureTable
from latentdiff.training.data.remote import find_remote, is_remote, read_remote
from latentdiff.training.data.shards import all_shards, find_folder_shards, find_shards, read_shards
from latentdiff.training.data.source import TRAIN, NoPicturesError, Source, Wanted
from latentdiff.training.data.survey import Entry, leave_out, log_findings, read_manifest, sound_pictures
from latentdiff.training.settings import Condition, RunSettings

logger = logging.getLogger(__name__)

REMEMBERED = 1000  # digests of a table that a run keeps
OTHERS = "%s: the pictures are not those that this run had so far; it goes on with these, not as it would have"
FEWEST, MOST_HELD_OUT = 40, 512  # pictures, for some to be held out, and of these


def load_pictures(source: str, split: str = "train", **options: Any) -> list[CaptionedPicture]:
    """The captioned pictures of `source`. Entries that cannot be used are logged by name; `read_source` gives them too.

    Args:
        source: one of

            - a folder with ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``: ``file_name``, the caption
              column (a string, or but for CSV a list of them), and optionally ``weight`` and ``split``;
            - a folder with a ``.txt`` or ``.caption`` file beside each picture;
            - WebDataset shards: a folder of ``.tar`` files, one such file, or a pattern such as
              ``shards/{000..099}.tar``, or such behind an address that fsspec reads;
            - a folder written by ``datasets.save_to_disk``, or a name for ``datasets.load_dataset``.

            A folder may have folders for its splits (``train``, ``validation`` or ``val``, ``test``), each with tables,
            text files or shards of its own, and a table in every folder. Files of shards and datasets may say their
            split in their names. Pictures of tables and datasets must lie in the folder, or in ``picture_folder``.
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
    if not found.pictures:
        faults = [f"; the first fault: {shorten(f.name, 300)}: {f.reason}" for f in found.refused[:1]]
        raise NoPicturesError(f"{name}: not one usable picture{''.join(faults)}")
    log_findings(found.refused, "left out")
    return found.pictures


def read_source(source: str, wanted: Wanted) -> Source:
    """The pictures of `source`, and what is wrong with those that cannot be used; see `load_pictures`.

    Raises:
        NoPicturesError: there is nothing, neither usable nor unusable.
    """
    found = _read(source, wanted)
    if found.is_empty:
        raise NoPicturesError(
            f"{source}: no captioned pictures found (split {wanted.split!r}); captions are in "
            "NAME.txt beside NAME.png, or in metadata.jsonl, .csv or .parquet"
        )
    logger.info("%s: %d pictures", source, found.count)
    return found


def _read(source: str, wanted: Wanted) -> Source:
    if is_remote(source):
        return read_remote(source, wanted)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, wanted)
    shards = find_shards(source)
    if shards:
        return read_shards(shards, wanted)
    check_name(source)
    from latentdiff.training.data.hf_datasets import read_dataset

    try:
        return read_dataset(source, wanted)
    except FileNotFoundError as error:
        if "://" in source and not isinstance(error, NoPicturesError):
            raise FileNotFoundError(
                f"{source}: behind an address shards are read, and their names end in .tar; load anything else into a "
                f"folder first. (Nor could a dataset of that name be loaded.)"
            ) from error
        near = None if isinstance(error, NoPicturesError) else folder_like(folder)
        if near is None:
            raise
        raise FileNotFoundError(
            f"{source}: no such folder; did you mean {near!r}? (Nor could a dataset of that name be loaded.)"
        ) from error


def _read_folder(folder: Path, wanted: Wanted) -> Source:
    found = None if is_saved_dataset(folder) else find_folder_shards(folder, wanted) or read_folder(folder, wanted)
    if found is None or (not found.count and not found.tables and _holds_dataset(folder)):
        from latentdiff.training.data.hf_datasets import read_dataset

        try:
            return read_dataset(str(folder), wanted)
        except ValueError:
            if found is None or not found.refused:
                raise
    if found.count or found.refused or not (found.splits or wanted.split != TRAIN):
        return found
    splits = ", ".join(sorted(found.splits)) or "none"
    what = f"{found.tables[0]}: no rows" if len(found.tables) == 1 else f"{folder}: no pictures"
    raise NoPicturesError(f"{what} of split {wanted.split!r}; its splits: {splits}")


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the `datasets` library has written it."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _holds_dataset(folder: Path) -> bool:
    """Whether there are files with pictures in them that the `datasets` library reads."""
    return any(path.is_file() for suffix in ("parquet", "arrow") for path in folder.rglob(f"*.{suffix}"))


def prepare_splits(
    settings: RunSettings, condition: Condition = "text"
) -> tuple[Sequence[CaptionedPicture], Sequence[CaptionedPicture]]:
    """Pictures to train on, and others to measure on: those of the split "validation" that are not trained on, or, if
    there are none, a share that `hold_out` takes. See `prepare_pictures`.
    """
    pictures = prepare_pictures(settings, condition=condition)
    try:
        found = prepare_pictures(settings, "validation", condition)
    except NoPicturesError:
        found = []
    held_out = unseen(found, pictures)  # folders that know no splits give the same pictures again
    if not held_out:
        pictures, held_out = hold_out(pictures, settings.held_out_share, condition)
        if held_out:
            logger.info("no split 'validation', so some are held out by their content (held_out_share=0 uses them too)")
    logger.info("%d pictures to train on, %d held out to measure on", len(pictures), len(held_out))
    return pictures, held_out


@overload
def hold_out(
    pictures: list[CaptionedPicture], share: float, condition: Condition = "text"
) -> tuple[list[CaptionedPicture], list[CaptionedPicture]]: ...
@overload
def hold_out(
    pictures: Sequence[CaptionedPicture], share: float, condition: Condition = "text"
) -> tuple[Sequence[CaptionedPicture], Sequence[CaptionedPicture]]: ...
def hold_out(
    pictures: Sequence[CaptionedPicture], share: float, condition: Condition = "text"
) -> tuple[Sequence[CaptionedPicture], Sequence[CaptionedPicture]]:
    """Those to train on, and about the `share` of them to measure on, at most about `MOST_HELD_OUT`, in their order.

    A picture's bytes alone decide, so it stays where it is as others come, and copies go together. Of fewer than
    `FEWEST` pictures none is held out, and none whose class would be left without pictures.

    Args:
        pictures: with digest.
        condition: "class" if captions are classes.
    """
    below = min(share, MOST_HELD_OUT / max(1, len(pictures))) if len(pictures) >= FEWEST else 0.0
    if isinstance(pictures, PictureTable):
        return _hold_out_of_table(pictures, below, condition)
    if below > 0:  # one at least, whatever chance says
        below = max(below, (min(int(picture.digest[:8], 16) for picture in pictures) + 1) / 2**32)
    wanted = [int(picture.digest[:8], 16) < below * 2**32 for picture in pictures]
    rest = {picture.captions for picture, out in zip(pictures, wanted, strict=True) if not out}
    wanted = [out and (condition != "class" or p.captions in rest) for p, out in zip(pictures, wanted, strict=True)]
    both = list(zip(pictures, wanted, strict=True))
    return [picture for picture, out in both if not out], [picture for picture, out in both if out]


def _hold_out_of_table(pictures: PictureTable, below: float, condition: Condition) -> tuple[PictureTable, PictureTable]:
    marks = pictures.marks()
    if below > 0:
        below = max(below, (int(marks.min()) + 1) / 2**32)
    out = np.flatnonzero(marks < below * 2**32)
    if condition == "class":
        classes = Counter(tuple(one) for some in pictures.captions() for one in some.to_pylist())
        own = [pictures[int(i)].captions for i in out]
        classes.subtract(own)
        out = out[[classes[caption] > 0 for caption in own]]
    rest = np.ones(len(pictures), dtype=bool)
    rest[out] = False
    return pictures.select(np.flatnonzero(rest).astype(np.uint32)), pictures.select(out)


def unseen(found: Sequence[CaptionedPicture], pictures: Sequence[CaptionedPicture]) -> Sequence[CaptionedPicture]:
    """Those of `found` that are not among `pictures`, by their bytes."""
    if len(found) and (isinstance(found, PictureTable) or isinstance(pictures, PictureTable)):
        own = _digests(found)
        new = np.flatnonzero(~np.isin(own, _among(own, _digests(pictures))))
        return found.select(new) if isinstance(found, PictureTable) else [found[i] for i in new.tolist()]
    wanted = {picture.digest for picture in found}
    seen = {picture.digest for picture in pictures if picture.digest in wanted} if wanted else wanted
    return [picture for picture in found if picture.digest not in seen]


def _digests(pictures: Sequence[CaptionedPicture]) -> NDArray[Any]:
    """(N,) the first eight bytes: among 20 million pictures two have the same with a chance of one in 100,000."""
    if isinstance(pictures, PictureTable):
        return pictures.digests(8).view(np.uint64)
    return np.array([int(picture.digest[:16], 16) for picture in pictures], dtype=">u8").view(np.uint64)


def _among(few: NDArray[Any], many: NDArray[Any]) -> NDArray[Any]:
    """Those of `many` that are one of `few`."""
    few = np.sort(few)
    return many[few[np.searchsorted(few, many).clip(max=len(few) - 1)] == many]


def refuse_another_table(file: Path, data: str, table: PictureTable) -> None:
    """See that a run goes on with its own pictures, as `refuse_other_pictures` does, by a few of their digests.

    Args:
        file: keeps the digests.

    Raises:
        ValueError: less than half of them are there.
    """
    before = []
    if file.is_file() and any((file.parent / "checkpoints").glob("step-*")):
        before = read_json(file).get("digests", [])
    known = np.array([int(digest[:16], 16) for digest in before], dtype=">u8").view(np.uint64)
    there = len(np.unique(_among(known, _digests(table)))) if before else 0
    if 2 * there < len(set(before)):
        raise ValueError(
            f"{file.parent.parent} holds a run on other pictures: of {len(before)} of them {there} are in {data}. "
            f"Choose another --output for these, or name the --data of that run to go on with it"
        )
    some = [table[i * len(table) // REMEMBERED].digest for i in range(REMEMBERED)]
    if before and some != before:
        logger.warning(OTHERS, data)
    write_text_whole(file, json_text({"digests": some}))


def prepare_pictures(
    settings: RunSettings,
    split: str | None = None,
    condition: Condition = "text",
    part: tuple[int, int] | None = None,
) -> Sequence[CaptionedPicture]:
    """The usable pictures of ``settings.data``, each decoded once, with digest and size; always in the same order.

    What was found is kept in ``manifest-SPLIT.jsonl`` in the run's ``training/`` folder, so that a repeated run looks
    only at what changed. Pictures that cannot be used are counted and named, and left out. Those that
    ``settings.manifest`` says to leave out are left out too, and do not count as bad.

    Of very many pictures in shards or a dataset the result is a `PictureTable` below ``settings.cache_dir``, or else
    the run's ``training/`` folder. As long as the shards stay as they are the next start opens it and reads no shard.

    Args:
        split: by default ``settings.split``.
        condition: what captions are for; with "none" every picture has the caption "".
        part: (k, n) for the k-th of n parts, from 1: by shards, or else by content.

    Raises:
        FileNotFoundError: there is no such source, split or manifest, or nothing in it can be used.
        ValueError: more than ``settings.max_bad_share`` of the pictures are unusable, or the run was trained on others.
    """
    folder = settings.folder
    cache_dir = Path(settings.cache_dir or folder)
    wanted = Wanted.of(settings, split, condition=condition, cache_dir=cache_dir / "stream")
    if part is not None and (is_remote(settings.data) or all_shards(settings.data, wanted)):
        wanted = replace(wanted, part=part)
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in wanted.split)[:60] or "all"
    about = {"data": settings.data, "split": wanted.split}
    own = "" if part is None else f"-{part[0]}-of-{part[1]}"
    manifest, run = f"manifest-{name}{own}.jsonl", Path(settings.output) / "training"
    others = sorted((cache_dir / "training").glob(f"manifest-{name}-*-of-*.jsonl"))  # of jobs that filled the cache
    left_out = None if settings.manifest is None else Path(settings.manifest).expanduser()
    key, tables = table_key(settings.data, wanted, left_out), cache_dir / "pictures"
    rows = partial(saved_rows, Path(settings.data).expanduser(), wanted)
    table = None if key is None else open_table(tables, key, rows)
    if table is None:
        unwanted = {} if left_out is None else read_manifest(left_out)
        large = LargeSurvey(
            folder / manifest, about, tables, {name for name, one in unwanted.items() if not one.use}, others
        )
        source = read_source(settings.data, replace(wanted, drain=None if key is None else large.take))
        table = large.finish(source, key, settings.max_bad_share) if key is not None and large.is_used else None
    if table is not None:
        logger.info("%s (%s): %d pictures, in %s", settings.data, wanted.split, len(table), table.file)
        if split is None and part is None:
            refuse_another_table(run / f"pictures-{name}.json", settings.data, table)
        if part is not None and wanted.part is None:
            return table.select(np.flatnonzero(table.marks() % part[1] == part[0] - 1))
        return table
    if left_out is not None:
        leave_out(source, unwanted)
    check = partial(refuse_other_pictures, run / manifest, settings.data) if split is None else None  # no held-out ones
    good, refused = sound_pictures(source, folder / manifest, about, settings.max_bad_share, check, others)
    if part is not None and wanted.part is None:
        good = [picture for picture in good if int(picture.digest[:8], 16) % part[1] == part[0] - 1]
    logger.info("%s (%s): %d pictures, %d left out", settings.data, wanted.split, len(good), len(refused))
    return good


def table_key(data: str, wanted: Wanted, manifest: Path | None) -> str | None:
    """What the table of very many pictures is found by: the files that hold them, as they are now, and what is wanted.

    Args:
        manifest: of what is left out.

    Returns:
        None: these are neither shards nor a dataset's folder, or there are pictures beside it.
    """
    folder = Path(data).expanduser()
    stamps: list[str] = []
    if is_remote(data):
        shards, stamps = [], [repr(shard) for shard in find_remote(data)]
    elif is_saved_dataset(folder):
        shards = sorted(path for path in folder.rglob("*") if path.is_file())
        if wanted.streaming or wanted.picture_folder or any(is_picture(path.name) for path in shards):
            return None
    else:
        shards = all_shards(data, wanted)
    if not shards and not is_remote(data):
        return None
    files = [shard.resolve() for shard in shards] + ([] if manifest is None else [manifest.resolve()])
    asked = {**asdict(replace(wanted, drain=None)), "cache_dir": None}
    asked = {key: value for key, value in asked.items() if key not in ("masks", "mask_column")}  # a table has none
    parts = [json.dumps(asked, sort_keys=True), *stamps, *(f"{file} {stamp_of(str(file))}" for file in files)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def refuse_other_pictures(manifest: Path, data: str, entries: Sequence[Entry]) -> None:
    """See that a run goes on with its own pictures: at least half of them, whatever comes to them.

    Args:
        manifest: names the pictures that the run had; a run without checkpoints is none yet.
        data: what `entries` are of, for the message.

    Raises:
        ValueError: fewer are there.
    """
    try:
        before = read_manifest(manifest) if any((manifest.parent / "checkpoints").glob("step-*")) else {}
    except (OSError, ValueError):  # the survey has said so
        return
    trained = {entry.digest for entry in before.values() if entry.use and entry.digest}
    now = {entry.digest for entry in entries if entry.use}
    there = trained & now
    if 2 * len(there) < len(trained):
        raise ValueError(
            f"{manifest.parent.parent} holds a run on other pictures: {len(there)} of its {len(trained)} are in "
            f"{data}. Choose another --output for these, or name the --data of that run to go on with it"
        )
    if trained and now != trained:
        logger.warning(f"{OTHERS} (gone: %d, new: %d)", data, len(trained - now), len(now - trained))
