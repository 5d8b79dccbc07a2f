"""Captioned pictures from the `datasets` library: from memory, from the disk, by name, or from a stream."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.interchange.folders import read_json
from latentdiff.interchange.user_files import check_regular, faults_named, parse_yaml, read_text
from latentdiff.training.data.caption_checks import check_weight, shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture, FileReader
from latentdiff.training.data.decode import is_picture
from latentdiff.training.data.source import TRAIN, NoPicturesError, Source, Wanted, inside, same_split

COPY_COLUMNS = ("image", "row")  # of a stream's copy: the encoded picture, and the other columns as JSON


@dataclass(frozen=True, slots=True)
class RowReader:
    """The encoded picture in a row of a `datasets.Dataset` whose only column is the picture, not decoded.

    Args:
        folders: a path in the row is relative to the first, and must lead into one of them; none: to any file here.
    """

    dataset: Any
    column: str
    index: int
    folders: tuple[Path, ...] = ()

    def __call__(self) -> bytes:
        found = self.dataset[self.index][self.column]
        if not isinstance(found, dict) or (found.get("bytes") is None and not found.get("path")):
            raise ValueError("there is no picture in this row")
        if found.get("bytes") is not None:
            return bytes(found["bytes"])
        return _read_path(str(found["path"]), self.folders)


def _read_path(path: str, folders: Sequence[Path]) -> bytes:
    """The bytes of the picture file that a row names. Raises ValueError if it lies elsewhere, or is no file."""
    if "://" in path:
        raise ValueError(f"{shorten(path, 200)}: pictures are read from the disk only; download them first")
    return FileReader(str(inside(folders[0], path, folders)) if folders else path)()


def read_dataset(source: str, wanted: Wanted) -> Source:
    """The pictures of a folder written by ``save_to_disk``, or of what ``load_dataset`` finds under a name.

    Paths in its rows must lead into the folder, into the caches of `datasets` and the hub if it is no folder, or into
    ``wanted.picture_folder``.

    Raises:
        NoPicturesError: it has no such split.
        FileNotFoundError: there is no such dataset, or it cannot be reached.
        ValueError: it lacks a column, or names files outside its folder.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    name = f"{source} ({wanted.split})"
    if Path(source).is_dir():
        folders = wanted.allowed(Path(source))
        check_dataset_folder(Path(source), folders)
    else:
        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
        folders = wanted.allowed(*map(Path, caches))
    with faults_named(source, foreign=True):
        if wanted.streaming:
            loaded = _copy_of_stream(source, wanted, folders)
        else:
            loaded = _load(source, wanted.split, streaming=False)
        return from_rows(loaded, name, wanted, folders, prefix=f"{source} ")


def check_dataset_folder(folder: Path, allowed: Sequence[Path]) -> None:
    """Raises ValueError if files of a dataset are pipes, devices or links that lead elsewhere, or settings name files
    elsewhere.

    Pictures are looked at when they are read.

    Args:
        allowed: see `Wanted.allowed`.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for path in folder.rglob("*"):
        links = path.is_symlink() and (path.is_dir() or path.suffix) and not is_picture(path.name)
        if links and not any(Path(os.path.realpath(path)).is_relative_to(one) for one in allowed):
            raise ValueError(f"{path} is a link out of the dataset's folder; picture_folder=FOLDER allows another one")
        if path.exists() and not path.is_dir() and not is_picture(path.name):
            check_regular(path)
        if path.name == "state.json":
            _check_names(read_json(path).get("_data_files"), path)
    for name in ("README.md", ".huggingface.yaml"):
        if (folder / name).is_file():
            text = read_text(folder / name)
            block = REGEX_YAML_BLOCK.search(text) if name == "README.md" else None
            settings = parse_yaml(block.group(2) if block else "" if name == "README.md" else text, folder / name)
            _check_names(settings.get("configs") if isinstance(settings, dict) else None, folder / name)


def _check_names(value: Any, file: Path) -> None:
    """Raises ValueError if a text in `value`, at any depth, is an address or a path that leaves the folder."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_names(item, file)
    elif isinstance(value, str) and ("://" in value or value.startswith(("/", "~")) or ".." in Path(value).parts):
        raise ValueError(f"{file}: {shorten(value, 200)} lies outside the dataset's folder, and is not read")


def _load(source: str, split: str, streaming: bool) -> Any:
    import datasets

    folder = Path(source)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _split_of(datasets.load_from_disk(source), source, split)
    try:
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source}: no such folder here, and no dataset of that name could be loaded ({error})"
        ) from error
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
    return _split_of(datasets.load_dataset(source, streaming=streaming), source, split)


def _split_of(loaded: Any, source: str, split: str) -> Any:
    if isinstance(loaded, dict):
        names = [name for name in (split, *loaded) if name in loaded and same_split(name) == same_split(split)]
        if not names:
            raise NoPicturesError(f"{source}: no split {split!r}; it has {shorten(', '.join(map(str, loaded)), 200)}")
        return loaded[names[0]]
    own = str(loaded.split or TRAIN)
    if split != TRAIN and same_split(own) != same_split(split):
        raise NoPicturesError(f"{source}: no split {split!r}; it has {own}")
    return loaded


def from_rows(dataset: Any, name: str, wanted: Wanted, folders: tuple[Path, ...] = (), prefix: str = "") -> Source:
    """The pictures of a `datasets.Dataset` (or dictionary of them), or of an `IterableDataset` by way of a copy.

    Args:
        folders: see `RowReader`.

    Raises:
        NoPicturesError: a dictionary of datasets has no such split.
        ValueError: it lacks a column.
    """
    import datasets

    dataset = _split_of(dataset, name, wanted.split) if isinstance(dataset, dict) else dataset
    if isinstance(dataset, datasets.IterableDataset):
        dataset = _copy(dataset, [name, repr(dataset)], wanted, folders, reuse=False)
    source = Source(prefix)
    rows: Iterator[dict[str, Any]]
    if tuple(dataset.column_names) == COPY_COLUMNS and dataset.features["row"].dtype == "string":
        column, rows = "image", map(json.loads, dataset.with_format(None)["row"])
    else:
        column, rows = wanted.image_column, _rows(dataset, name, wanted)
    reader = _row_reader(dataset, column, folders)
    masks = _mask_reader(dataset, name, wanted, folders)
    for index, row in enumerate(rows):
        if source.is_full(wanted):
            break
        where = f"{name}[{index}]"
        try:
            if "refused" in row:
                raise ValueError(row["refused"])
            captions = wanted.captions(row.get(wanted.caption_column))
            weight = check_weight(row.get("weight"))
            mask = None if masks is None else replace(masks, index=index)
            source.add(CaptionedPicture(where, replace(reader, index=index), captions, weight, mask=mask), wanted)
        except ValueError as error:
            source.refuse(where, error)
    return source


def _row_reader(dataset: Any, column: str, folders: tuple[Path, ...]) -> RowReader:
    """Of the first row; of any other by its index."""
    import datasets

    images = dataset.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return RowReader(images, column, 0, folders)


def _mask_reader(dataset: Any, name: str, wanted: Wanted, folders: tuple[Path, ...]) -> RowReader | None:
    """As `_row_reader`, of the masks; None: none are asked for.

    Raises:
        ValueError: there is no such column, or a stream's copy is without it.
    """
    column = wanted.mask_column
    if not wanted.masks or column is None:
        return None
    if wanted.streaming:
        raise ValueError(f"{name}: mask_column is not for streaming=true, whose copy keeps pictures and captions only")
    if column not in dataset.column_names:
        raise ValueError(f"{name}: no column {column!r}; it has {shorten(', '.join(dataset.column_names), 200)}")
    try:
        return _row_reader(dataset, column, folders)
    except (TypeError, ValueError, NotImplementedError) as error:  # Arrow's are among these
        raise ValueError(f"{name}: the column {column!r} has no pictures ({error})") from error


def saved_rows(folder: Path, wanted: Wanted) -> RowReader:
    """What reads the rows of a split that `read_dataset` has read before from a folder written by ``save_to_disk``."""
    folders = wanted.allowed(folder)
    check_dataset_folder(folder, folders)
    return _row_reader(_load(str(folder), wanted.split, streaming=False), wanted.image_column, folders)


def _rows(dataset: Any, name: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Caption and weight of every row, without its picture."""
    _check_columns(dataset.column_names, name, wanted)
    columns = [c for c in (wanted.caption_column, "weight") if c in dataset.column_names]
    if not columns:
        return ({} for _ in range(len(dataset)))
    names = _label_names(dataset.features, wanted)
    return (_named(row, names, wanted) for row in dataset.with_format(None).select_columns(columns))


def _label_names(features: Any, wanted: Wanted) -> list[str] | None:
    """What the numbers in the caption column stand for, if it is a column of labels."""
    import datasets

    feature = (features or {}).get(wanted.caption_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _named(row: dict[str, Any], names: list[str] | None, wanted: Wanted) -> dict[str, Any]:
    """A row with its label's name instead of the number; -1 stands for no label."""
    label = row.get(wanted.caption_column)
    if names is None or not isinstance(label, int):
        return row
    return {**row, wanted.caption_column: names[label] if 0 <= label < len(names) else None}


def _check_columns(have: list[str], name: str, wanted: Wanted) -> None:
    for column in [wanted.image_column] + ([] if wanted.may_lack_captions else [wanted.caption_column]):
        if column not in have:
            raise ValueError(f"{name}: no column {column!r}; it has {shorten(', '.join(have), 200)}")


def _copy_of_stream(source: str, wanted: Wanted, folders: tuple[Path, ...]) -> Any:
    """A stream by name as a dataset on the disk. What was copied before is used again, unless local files changed."""
    parts = [source, wanted.split]
    if Path(source).is_dir():
        files = sorted(path for path in Path(source).rglob("*") if path.is_file())
        parts += [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    stream = _load(source, wanted.split, streaming=True)
    if not hasattr(stream, "_ex_iterable"):  # a folder written by save_to_disk has random access already
        return stream
    return _copy(stream, parts, wanted, folders, reuse=True)


def _copy(stream: Any, parts: list[str], wanted: Wanted, folders: tuple[Path, ...], reuse: bool) -> Any:
    """Read a stream to its end, or as far as asked; `datasets` writes the copy whole or not at all."""
    import datasets

    parts = [*parts, *map(str, folders), wanted.image_column, wanted.caption_column, str(wanted.max_pictures)]
    key = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    features = datasets.Features({"image": datasets.Image(decode=False), "row": datasets.Value("string")})
    folder = None if wanted.cache_dir is None else str(wanted.cache_dir)
    more: dict[str, Any] = {"fingerprint": key} if reuse else {}
    given = {"stream": stream, "name": parts[0], "wanted": replace(wanted, drain=None), "folders": folders}
    try:
        return datasets.Dataset.from_generator(
            stream_rows, features=features, cache_dir=folder, gen_kwargs=given, **more
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{parts[0]}: the stream could not be read to its end ({cause})") from error


def stream_rows(stream: Any, name: str, wanted: Wanted, folders: tuple[Path, ...] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a stream as its copy keeps them, pictures as they are encoded, or why one cannot be had."""
    import datasets

    if stream.column_names is None:
        stream = stream._resolve_features()
    _check_columns(list(stream.column_names or []), name, wanted)
    stream = stream.cast_column(wanted.image_column, datasets.Image(decode=False))
    names = _label_names(stream.features, wanted)
    for row in itertools.islice(stream, wanted.max_pictures):
        row = _named(row, names, wanted)
        rest = {column: row.get(column) for column in (wanted.caption_column, "weight")}
        image = row[wanted.image_column]
        if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
            try:
                image = {"bytes": _fetched(str(image["path"]), name, folders), "path": None}
            except (OSError, ValueError) as error:
                rest["refused"] = str(error)
                image = None
        kept = image if isinstance(image, dict) else {"bytes": b"", "path": None}
        yield {"image": kept, "row": json.dumps(rest, default=str)}


def _fetched(path: str, name: str, folders: tuple[Path, ...]) -> bytes:
    """The picture that a streamed row names: one of the same dataset on the hub, or see `_read_path`."""
    inner, _, outer = path.rpartition("::")  # of a picture in an archive: zip://1.png::hf://...
    if not outer.startswith(f"hf://datasets/{name}@") or "://" in inner.removeprefix("zip://"):
        return _read_path(path, folders)
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return bytes(file.read())
