"""Captioned pictures from the `datasets` library: from memory, from the disk, by name, or from a stream."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.training.data.captions import check_weight, shorten
from latentdiff.training.data.pictures import CaptionedPicture, FileReader
from latentdiff.training.data.source import NoPicturesError, Source, Wanted

COPY_COLUMNS = ("image", "row")  # of a stream's copy: the encoded picture, and the other columns as JSON


@dataclass(frozen=True, slots=True)
class RowReader:
    """The encoded picture in a row of a `datasets.Dataset` whose only column is the picture, not decoded."""

    dataset: Any
    column: str
    index: int

    def __call__(self) -> bytes:
        found = self.dataset[self.index][self.column]
        if not isinstance(found, dict):
            raise ValueError("there is no picture in this row")
        if found.get("bytes") is not None:
            return bytes(found["bytes"])
        if not found.get("path"):
            raise ValueError("there is no picture in this row")
        return FileReader(found["path"])()


def read_dataset(source: str, wanted: Wanted) -> Source:
    """The pictures of a folder written by ``save_to_disk``, or of what ``load_dataset`` finds under a name.

    Raises:
        NoPicturesError: it has no such split.
        FileNotFoundError: there is no such dataset, or it cannot be reached.
        ValueError: it lacks a column.
    """
    name = f"{source} ({wanted.split})"
    loaded = _copy_of_stream(source, wanted) if wanted.streaming else _load(source, wanted.split, streaming=False)
    found = from_rows(loaded, name, wanted)
    found.prefix = f"{source} "
    return found


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
        if "split" in str(error).lower():
            raise NoPicturesError(f"{source}: no split {split!r} ({shorten(str(error), 300)})") from error
        raise


def _split_of(loaded: Any, source: str, split: str) -> Any:
    import datasets

    if isinstance(loaded, datasets.DatasetDict | datasets.IterableDatasetDict):
        if split not in loaded:
            raise NoPicturesError(f"{source}: no split {split!r}; it has {', '.join(map(str, loaded))}")
        return loaded[split]
    own = str(loaded.split or "train")
    if split != "train" and own != split:
        raise NoPicturesError(f"{source}: no split {split!r}; it has {own}")
    return loaded


def from_rows(dataset: Any, name: str, wanted: Wanted) -> Source:
    """The pictures of a `datasets.Dataset` (or dictionary of them), or of an `IterableDataset` by way of a copy.

    Raises:
        NoPicturesError: a dictionary of datasets has no such split.
        ValueError: it lacks a column.
    """
    import datasets

    dataset = _split_of(dataset, name, wanted.split) if isinstance(dataset, dict) else dataset
    if isinstance(dataset, datasets.IterableDataset):
        dataset = _copy(dataset, [name, repr(dataset)], wanted, reuse=False)
    source = Source(prefix="")
    rows: Iterator[dict[str, Any]]
    if tuple(dataset.column_names) == COPY_COLUMNS and dataset.features["row"].dtype == "string":
        column, rows = "image", map(json.loads, dataset.with_format(None)["row"])
    else:
        column, rows = wanted.image_column, _rows(dataset, name, wanted)
    images = dataset.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for index, row in enumerate(rows):
        if source.is_full(wanted):
            break
        where = f"{name}[{index}]"
        try:
            captions = wanted.captions(row.get(wanted.caption_column))
            reader = RowReader(images, column, index)
            source.pictures.append(CaptionedPicture(where, reader, captions, check_weight(row.get("weight"))))
        except ValueError as error:
            source.refuse(where, error)
    return source


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
            raise ValueError(f"{name}: no column {column!r}; it has {', '.join(have)}")


def _copy_of_stream(source: str, wanted: Wanted) -> Any:
    """A stream by name as a dataset on the disk. What was copied before is used again, unless local files changed."""
    parts = [source, wanted.split]
    if Path(source).is_dir():
        files = sorted(path for path in Path(source).rglob("*") if path.is_file())
        parts += [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    stream = _load(source, wanted.split, streaming=True)
    if not hasattr(stream, "_ex_iterable"):  # a folder written by save_to_disk has random access already
        return stream
    return _copy(stream, parts, wanted, reuse=True)


def _copy(stream: Any, parts: list[str], wanted: Wanted, reuse: bool) -> Any:
    """Read a stream to its end, or as far as asked; `datasets` writes the copy whole or not at all."""
    import datasets

    parts = [*parts, wanted.image_column, wanted.caption_column, str(wanted.max_pictures)]
    key = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    features = datasets.Features({"image": datasets.Image(decode=False), "row": datasets.Value("string")})
    folder = None if wanted.cache_dir is None else str(wanted.cache_dir)
    more: dict[str, Any] = {"fingerprint": key} if reuse else {}
    given = {"stream": stream, "name": parts[0], "wanted": wanted}
    try:
        return datasets.Dataset.from_generator(
            stream_rows, features=features, cache_dir=folder, gen_kwargs=given, **more
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{parts[0]}: the stream could not be read to its end ({cause})") from error


def stream_rows(stream: Any, name: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """The rows of a stream as its copy keeps them, pictures as they are encoded."""
    import datasets

    if stream.column_names is None:
        stream = stream._resolve_features()
    _check_columns(list(stream.column_names or []), name, wanted)
    stream = stream.cast_column(wanted.image_column, datasets.Image(decode=False))
    names = _label_names(stream.features, wanted)
    for row in itertools.islice(stream, wanted.max_pictures):
        row = _named(row, names, wanted)
        rest = {column: row.get(column) for column in (wanted.caption_column, "weight")}
        yield {"image": _fetched(row[wanted.image_column]), "row": json.dumps(rest, default=str)}


def _fetched(image: Any) -> dict[str, Any]:
    """An encoded picture with its bytes, read from where the stream says they are; empty if they cannot be read."""
    if not isinstance(image, dict) or image.get("bytes") is not None or not image.get("path"):
        return image if isinstance(image, dict) else {"bytes": b"", "path": None}
    from datasets.utils.file_utils import xopen

    try:
        with xopen(image["path"], "rb") as file:
            return {"bytes": file.read(), "path": image["path"]}
    except OSError:
        return {"bytes": b"", "path": image["path"]}
