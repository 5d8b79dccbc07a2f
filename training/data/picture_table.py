"""Millions of captioned pictures as a table on the disk: memory-mapped Arrow, in memory only where it is read."""

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from latentdiff.training.data.caption_checks import has_sides
from latentdiff.training.data.captioned_picture import CaptionedPicture

FORMAT = 1  # to be raised when columns change, or what `has_sides` says
ROWS = 1 << 16  # of a batch; all but the last have so many
READS = 256  # pictures from anywhere, after which mapped memory is given back
PLACES = {"start": 0, "length": 0, "index": 0}
"""Fields of readers in which the pictures of one shard or dataset differ."""
Rows = NDArray[np.integer[Any]]


def schema() -> Any:
    """The columns of a table. `reader` is the number of what reads the picture, but for the fields of `PLACES`."""
    import pyarrow as pa

    texts = {"name": pa.string(), "captions": pa.list_(pa.string()), "digest": pa.binary(32)}
    numbers = {"weight": pa.float64(), "loss_weight": pa.float64(), "width": pa.int32(), "height": pa.int32()}
    places = {"reader": pa.int32(), "start": pa.int64(), "length": pa.int64()}
    return pa.schema({**texts, **numbers, **places, "has_sides": pa.bool_()})


class PictureTable(Sequence[CaptionedPicture]):
    """Pictures with their digests and sizes, each made when it is asked for.

    Several processes share the memory; one that reads ahead opens the file again.

    Args:
        file: as `TableWriter` writes it.
        readers: what the column `reader` counts.
        rows: which of the file's, and in which order; by default all.
    """

    def __init__(self, file: Path, readers: Sequence[Any], rows: Rows | None = None) -> None:
        self.file, self.readers, self.rows = file, readers, rows
        self._reads = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "readers": self.readers, "rows": self.rows, "_reads": 0}

    @cached_property
    def _batches(self) -> list[Any]:
        import pyarrow as pa

        found = pa.ipc.open_file(pa.py_buffer(self._memory))
        return [found.get_batch(i) for i in range(found.num_record_batches)]

    @cached_property
    def _memory(self) -> mmap.mmap:
        with self.file.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _let_go(self) -> None:
        """What is mapped of the file counts as this process's memory, and the system maps far more than is read."""
        self._reads = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _passing(self) -> Iterator[Any]:
        """The batches, each to be read once."""
        for number, batch in enumerate(self._batches):
            yield batch
            if number % 16 == 0:
                self._let_go()
        self._let_go()

    def __len__(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        return sum(batch.num_rows for batch in self._batches)

    @overload
    def __getitem__(self, index: int) -> CaptionedPicture: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> "CaptionedPicture | Self":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        self._reads += 1
        if self._reads > READS:
            self._let_go()
        index %= len(self)
        number, offset = divmod(index if self.rows is None else int(self.rows[index]), ROWS)
        return self._picture({name: self._batches[number][name][offset].as_py() for name in COLUMNS})

    def __iter__(self) -> Iterator[CaptionedPicture]:
        if self.rows is not None:
            yield from map(self.__getitem__, range(len(self)))
            return
        for batch in self._passing():
            for start in range(0, batch.num_rows, 1024):
                yield from map(self._picture, batch.select(COLUMNS).slice(start, 1024).to_pylist())

    def _picture(self, row: dict[str, Any]) -> CaptionedPicture:
        reader = self.readers[row["reader"]]
        places = {name: row["length" if name == "length" else "start"] for name in PLACES if hasattr(reader, name)}
        return CaptionedPicture(
            row["name"],
            replace(reader, **places) if places else reader,
            tuple(row["captions"]),
            row["weight"],
            row["loss_weight"],
            row["digest"].hex(),
            (row["width"], row["height"]),
        )

    def identity(self) -> str:
        """Differs if the file was written anew, or rows are others."""
        state = self.file.stat()
        rows = b"" if self.rows is None else np.ascontiguousarray(self.rows).data
        return f"{state.st_size} {state.st_mtime_ns} {hashlib.sha256(rows).hexdigest()}"

    def select(self, rows: Rows) -> Self:
        """Those of these numbers, in their order."""
        return type(self)(self.file, self.readers, rows if self.rows is None else self.rows[rows])

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers. (N,)"""
        parts = [np.array(batch[name].to_numpy(zero_copy_only=False)) for batch in self._passing()]
        whole = np.concatenate(parts) if parts else np.zeros(0)
        return whole if self.rows is None else whole[self.rows]

    def digests(self, size: int = 32) -> NDArray[np.void]:
        """The first `size` bytes of each picture's SHA-256. (N,)"""
        parts = [np.array(_digest_bytes(batch["digest"])[:, :size]) for batch in self._passing()]
        whole = np.ascontiguousarray(np.concatenate(parts)).view(f"V{size}").reshape(-1)
        return whole if self.rows is None else whole[self.rows]

    def marks(self) -> NDArray[np.uint32]:
        """The number that the first eight hexadecimal digits of each picture's digest are. (N,)"""
        return self.digests(4).view(">u4").astype(np.uint32)

    def captions(self) -> Iterator[Any]:
        """The captions of each picture, as Arrow lists, in the order of the file."""
        rows = None if self.rows is None else np.sort(self.rows)
        for number, batch in enumerate(self._passing()):
            if rows is None:
                yield batch["captions"]
            else:
                first, last = np.searchsorted(rows, [number * ROWS, (number + 1) * ROWS])
                yield batch["captions"].take(rows[first:last] - number * ROWS)

    def is_each_of_one(self) -> bool:
        """Whether every picture has one caption, and that is not empty."""
        import pyarrow.compute as pc

        lengths: set[int] = set()
        for some in self.captions():
            lengths.update(pc.unique(pc.list_value_length(some)).to_pylist())
        return lengths <= {1} and "" not in self.first_captions()

    def first_captions(self) -> set[str]:
        """The different ones among the first of each picture."""
        import pyarrow.compute as pc

        found: set[str] = set()
        for some in self.captions():
            found.update(pc.unique(pc.list_element(some, 0)).to_pylist())
        return found


class Joined(Sequence[CaptionedPicture]):
    """Pictures one after the other."""

    def __init__(self, *parts: Sequence[CaptionedPicture]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[CaptionedPicture]:
        return chain.from_iterable(self.parts)

    @overload
    def __getitem__(self, index: int) -> CaptionedPicture: ...
    @overload
    def __getitem__(self, index: slice) -> list[CaptionedPicture]: ...
    def __getitem__(self, index: int | slice) -> CaptionedPicture | list[CaptionedPicture]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)

    def first_captions(self) -> set[str]:
        """The different ones among the first of each picture."""
        return set().union(*map(first_captions, self.parts))


def identity(pictures: Sequence[CaptionedPicture]) -> str | None:
    """What very many pictures, or these and a few, are known by in another run; None: they are only a few."""
    if isinstance(pictures, PictureTable):
        return pictures.identity()
    if not isinstance(pictures, Joined) or not any(isinstance(part, PictureTable) for part in pictures.parts):
        return None
    found = [identity(part) or [(one.digest, one.size, *one.captions) for one in part] for part in pictures.parts]
    return hashlib.sha256(repr(found).encode("utf-8", "surrogatepass")).hexdigest()


def first_captions(pictures: Sequence[CaptionedPicture]) -> set[str]:
    """The different ones among the first of each picture."""
    if isinstance(pictures, PictureTable | Joined):
        return pictures.first_captions()
    return {picture.captions[0] for picture in pictures}


COLUMNS = [
    *("name", "captions", "digest", "weight", "loss_weight", "width", "height", "reader", "start", "length"),
]
"""Those that a picture is made of."""


def _digest_bytes(column: Any) -> NDArray[np.uint8]:
    """(N, 32)"""
    content = np.frombuffer(column.buffers()[1], np.uint8)
    return content[column.offset * 32 : (column.offset + len(column)) * 32].reshape(-1, 32)


def weights(pictures: Sequence[CaptionedPicture]) -> "NDArray[np.float64] | list[float]":
    """(N,)"""
    return pictures.column("weight") if isinstance(pictures, PictureTable) else [p.weight for p in pictures]


def of_sides(pictures: Sequence[CaptionedPicture]) -> "NDArray[np.int64] | list[int]":
    """Numbers of those whose captions speak of left, right or text."""
    if isinstance(pictures, PictureTable):
        return np.flatnonzero(pictures.column("has_sides"))
    return [i for i, picture in enumerate(pictures) if has_sides(picture)]


class TableWriter:
    """Writes a table, a batch at a time. To be closed.

    Args:
        file: new.
    """

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self.file, self.readers, self.count = file, list[Any](), 0
        self._rows: list[dict[str, Any]] = []
        self._stream = pa.OSFile(str(file), "wb")
        self._writer = pa.ipc.new_file(self._stream, schema())

    def add(self, pictures: Iterable[CaptionedPicture]) -> None:
        """Pictures with digest and size."""
        for picture in pictures:
            self._rows.append(self._row(picture))
            if len(self._rows) == ROWS:
                self._flush()

    def _row(self, picture: CaptionedPicture) -> dict[str, Any]:
        read: Any = picture.read
        assert picture.size is not None
        common = {name: 0 for name in PLACES if hasattr(read, name)}
        reader = replace(read, **common) if common else read
        if not self.readers or self.readers[-1] != reader:
            self.readers.append(reader)
        return {
            "name": picture.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
            "captions": list(picture.captions),
            "digest": bytes.fromhex(picture.digest),
            "weight": picture.weight,
            "loss_weight": picture.loss_weight,
            "width": picture.size[0],
            "height": picture.size[1],
            "reader": len(self.readers) - 1,
            "start": getattr(read, "start", getattr(read, "index", 0)),
            "length": getattr(read, "length", 0),
            "has_sides": has_sides(picture),
        }

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema()))
        self.count += len(self._rows)
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()
        self._stream.close()
