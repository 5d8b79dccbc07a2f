"""Where the tensors of a cache lie, by key, in a file that all processes map together: for very many of them.

The file is a heading in JSON, and three columns sorted by key: the first eight bytes of each key, the other twelve, and
a number that says where the tensor lies. It can be made again from the shards at any time.
"""

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentdiff.interchange.atomic import atomic_file

FORMAT = 1  # to be raised when the file changes
KEY = 20  # bytes
COLUMNS = {"head": np.dtype("u8"), "tail": np.dtype((np.uint8, KEY - 8)), "place": np.dtype("i8")}
Split = tuple[int, bytes]


@dataclass(frozen=True)
class KeyIndex:
    """Keys and places, on the disk.

    Args:
        shards: the files that the places are in, and their sizes.
        kinds: what the places count, as plain values.
        head, tail, place: (N,) uint64, (N, 12) uint8, (N,) int64, sorted by the first.
    """

    shards: Mapping[str, int]
    kinds: Sequence[Any]
    head: NDArray[np.uint64]
    tail: NDArray[np.uint8]
    place: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.head)

    def find(self, key: str) -> int | None:
        """The place of a key; None: it is not there."""
        split = split_key(key)
        if split is None:
            return None
        at = bisect_left(self.head, split[0])
        while at < len(self.head) and self.head[at] == split[0]:
            if self.tail[at].tobytes() == split[1]:
                return int(self.place[at])
            at += 1
        return None

    @classmethod
    def read(cls, file: Path) -> "KeyIndex | None":
        """Map a file; None: there is none, or it is damaged or of another version."""
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                size = file.stat().st_size
                said = json.loads(stream.read(length)) if length <= size else {}
            start, count, columns = 8 + length, int(said["count"]), []
            if said["format"] != FORMAT or size != start + count * sum(kind.itemsize for kind in COLUMNS.values()):
                return None
            for kind in COLUMNS.values():
                shape = (count, *kind.shape)
                empty = np.zeros(shape, kind.base)  # nothing can be mapped
                columns.append(np.memmap(file, kind.base, "r", start, shape) if count else empty)
                start += count * kind.itemsize
            return cls(dict(said["shards"]), list(said["kinds"]), *map(np.asarray, columns))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def split_key(key: str) -> Split | None:
    """A key as the index has it; None: it is no digest."""
    try:
        content = bytes.fromhex(key)
    except ValueError:
        return None
    return (int.from_bytes(content[:8], "big"), content[8:]) if len(content) == KEY and content.hex() == key else None


def write_index(
    file: Path, shards: Mapping[str, int], kinds: Sequence[Any], old: KeyIndex | None, more: Mapping[str, int]
) -> None:
    """Write an index of the keys of an old one and more.

    Args:
        kinds: those of the old one, and more.
        more: places of keys that are digests, and not in the old one.

    Raises:
        OSError: it cannot be written; then the file is as it was.
    """
    heading = {"format": FORMAT, "count": len(more) + len(old or ()), "shards": dict(shards), "kinds": list(kinds)}
    with atomic_file(file) as partial, partial.open("wb") as stream:
        content = json.dumps(heading).encode()
        content += b" " * (-len(content) % 8)
        stream.write(len(content).to_bytes(8, "little") + content)
        for column in merged(old, more):
            stream.write(np.ascontiguousarray(column).data)


def merged(old: KeyIndex | None, more: Mapping[str, int]) -> Iterator[NDArray[Any]]:
    """The columns of both, one at a time."""
    content = np.frombuffer(bytes.fromhex("".join(more)), np.uint8).reshape(-1, KEY)
    head = np.ascontiguousarray(content[:, :8]).view(">u8").ravel().astype("u8")
    order = np.argsort(head, kind="stable")
    places = np.fromiter(more.values(), np.int64, len(more))
    new: tuple[NDArray[Any], ...] = (head[order], content[order, 8:], places[order])
    if old is None:
        yield from new
        return
    at: Any = np.searchsorted(old.head, new[0])
    columns: tuple[NDArray[Any], ...] = (old.head, old.tail, old.place)
    for before, own in zip(columns, new, strict=True):
        yield np.insert(before, at, own, axis=0)
