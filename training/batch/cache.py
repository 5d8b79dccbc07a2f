"""What frozen networks make of pictures and captions, encoded once and kept in a folder, found by what it was made of.

The folder holds safetensors files ("shards"), each written whole under a name of its own and never changed. So any
number of processes and runs can add to one folder at once, an interruption loses only what was not yet written, and
reading needs no lock. Tensors are read where they lie, through the operating system's memory map.
"""

import hashlib
import json
import logging
import math
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.shared_cache import INDEX, NOTE, Hold, exclusive, trim
from latentdiff.training.batch.key_index import KeyIndex, split_key, write_index

logger = logging.getLogger(__name__)

DIGEST = 40  # hexadecimal digits of a digest, 160 bits
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I16": torch.int16, "I32": torch.int32}
OPEN_SHARDS = 1024  # memory maps kept at a time; they hold no file open
ABANDONED = 86_400.0  # seconds after which a half-written shard has no writer any more
INDEXED = 1 << 18  # places in memory, from which on they are moved to a file
START_BITS = 48  # of a place, for the offset in the shard; the rest is the number of its kind


def digest(*parts: object) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:DIGEST]


def plain_config(config: Any, *left_out: str) -> dict[str, Any]:
    """A model's config without its private keys and those of `left_out`, at every depth."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    return {
        key: plain_config(value, *left_out) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not str(key).startswith("_") and key not in left_out
    }


@dataclass(frozen=True, slots=True)
class Kind:
    """What many tensors of a shard have in common."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def values(self) -> list[Any]:
        """For `plain`."""
        return [self.shard, str(self.dtype).removeprefix("torch."), list(self.shape)]

    @classmethod
    def plain(cls, shard: str, dtype: str, shape: Sequence[int]) -> Self:
        return cls(shard, getattr(torch, dtype), tuple(shape))


class TensorStore:
    """Tensors by key, in `folder`, which is made when first written to.

    Keys are digests: what is stored under a key never changes. A tensor that comes back is a copy. Where very many
    lie is read from a file that all processes map, see `KeyIndex`; where the others lie is in memory.

    Args:
        labels: of what is written, for `shared_cache.Shard.labels`.
    """

    def __init__(self, folder: Path, labels: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder)
        self.labels = dict(labels or {})
        root = shared_folder()
        self._hold = Hold(self.folder) if self.folder.absolute().is_relative_to(root) else None
        self._swept = False
        self._index_seen: tuple[int, ...] = ()
        self._forget()
        self.refresh()

    def _forget(self, index: KeyIndex | None = None) -> None:
        """Know only what an index says."""
        self._index = index
        self._places: dict[str, int] = {}  # of keys that are not in it; whole numbers, because there may be millions
        self._kinds = [] if index is None else [Kind.plain(*values) for values in index.kinds]
        self._sizes = {} if index is None else dict(index.shards)  # of each shard that was looked at, in bytes
        self._maps: OrderedDict[str, Tensor] = OrderedDict()

    def _place(self, key: str) -> int | None:
        place = self._places.get(key)
        return self._index.find(key) if place is None and self._index is not None else place

    def __contains__(self, key: str) -> bool:
        return self._place(key) is not None

    def __len__(self) -> int:
        return len(self._places) + len(self._index or ())

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not stored, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self]

    def __getitem__(self, key: str) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            KeyError: there is none.
            OSError: its file was deleted or changed.
        """
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        number, start = divmod(place, 1 << START_BITS)
        kind = self._kinds[number]
        content = self._map(kind.shard)[start : start + kind.nbytes].clone()
        return content.view(kind.dtype).reshape(kind.shape)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors of `DTYPES`, as one new shard.

        Raises:
            OSError: it cannot be written; then nothing of it remains.
        """
        if not tensors:
            return
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, self.labels)
        name = f"{uuid.uuid4().hex}.safetensors"
        try:
            if self._hold is not None:
                with exclusive(self.folder):
                    self._hold.add([name])
            with atomic_file(self.folder / name, sync=True) as partial:
                partial.write_bytes(content)
                self._sweep(partial.stat().st_mtime)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.folder}: {len(content):,} bytes could not be written ({error.strerror}); make room, "
                f"or choose another cache_dir. What was there before is whole",
            ) from error
        self._look_at(name)
        self.trim()

    def claim(self, keys: Iterable[str]) -> None:
        """Refresh, and keep what is stored under these keys from being deleted while this process runs."""
        if self._hold is None or not self.folder.is_dir():
            return self.refresh()
        with exclusive(self.folder):
            self.refresh()
            numbers = {place >> START_BITS for place in map(self._place, keys) if place is not None}
            self._hold.add({self._kinds[number].shard for number in numbers})
        return None

    def trim(self) -> None:
        """Keep the folder that a user's runs share within its limit."""
        if self._hold is not None:
            trim(shared_folder())

    def refresh(self) -> None:
        """See what other processes have written, and what was deleted."""
        present = dict(self._shards())
        if not self._sizes.keys() <= present.keys():
            self._forget()
        self._read_index(present)
        for name in present:
            if name not in self._sizes:
                self._look_at(name)

    def _read_index(self, present: Mapping[str, int]) -> None:
        """Take up an index that is new, if all shards of which it speaks are there as they were."""
        file = self.folder / INDEX
        with suppress(OSError):
            state = file.stat()
            now = (state.st_ino, state.st_size, state.st_mtime_ns)
            if now == self._index_seen and self._index is not None:
                return
            index = KeyIndex.read(file)
            if index is not None and all(present.get(name) == size for name, size in index.shards.items()):
                self._forget(index)
                self._index_seen = now

    def holds(self, what: str) -> bool:
        """Whether all is here that was here when `what` was noted; then none of it is deleted while this process runs.

        what: a digest.
        """
        try:
            names = set(json.loads((self.folder / f"{NOTE}{what}").read_bytes()))
            if self._hold is None:
                return names <= self._sizes.keys()
            with exclusive(self.folder):
                self.refresh()
                if whole := names <= self._sizes.keys():
                    self._hold.add(names)
            return whole
        except (OSError, ValueError, TypeError):
            return False

    def note(self, what: str) -> None:
        """Let all that is here now be that of `what`."""
        with suppress(OSError), atomic_file(self.folder / f"{NOTE}{what}") as partial:
            partial.write_text(json.dumps(sorted(self._sizes)), encoding="utf-8")

    def index(self) -> None:
        """Move the places that are in memory to the file on the disk, if they are very many.

        It is left out where the disk is full.
        """
        if len(self._places) < INDEXED or any(split_key(key) is None for key in self._places):
            return
        kinds = [kind.values() for kind in self._kinds]
        try:
            write_index(self.folder / INDEX, self._sizes, kinds, self._index, self._places)
        except OSError as error:
            logger.warning("%s; the next start reads all of the cache's files", error)
        self.refresh()

    def _shards(self) -> Iterator[tuple[str, int]]:
        """Names and sizes."""
        if self.folder.is_dir():
            for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
                if entry.name.endswith(".safetensors") and not entry.name.startswith(".") and entry.is_file():
                    yield entry.name, entry.stat().st_size

    def _look_at(self, name: str) -> None:
        file = self.folder / name
        self._sizes[name] = 0
        try:
            self._sizes[name] = file.stat().st_size
            self._add(name, list(contents(file)))
        except FileNotFoundError:  # deleted just now
            del self._sizes[name]
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning(
                "%s is damaged or not of this cache and skipped (%s); what it held is encoded again. It can be deleted",
                file,
                error,
            )

    def _add(self, shard: str, tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        """Tensors lie at a shard's end, one after the other."""
        numbers: dict[Kind, int] = {}
        sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors]
        start = self._sizes[shard] - sum(sizes)
        for (key, dtype, shape), size in zip(tensors, sizes, strict=True):
            kind = Kind(shard, dtype, shape)
            if kind not in numbers:
                numbers[kind] = len(self._kinds)
                self._kinds.append(kind)
            if key not in self:
                self._places[key] = numbers[kind] << START_BITS | start
            start += size

    def _map(self, name: str) -> Tensor:
        """A shard's bytes, memory-mapped. (size,) uint8"""
        if name not in self._maps:
            file = self.folder / name
            try:
                mapped = torch.from_file(str(file), shared=False, size=self._sizes[name], dtype=torch.uint8)
            except RuntimeError as error:
                reason = "changed" if file.exists() else "was deleted"
                raise OSError(
                    f"{file} {reason} while in use; start again; what it held is then encoded again"
                ) from error
            self._maps[name] = mapped
            if len(self._maps) > OPEN_SHARDS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(name)
        return self._maps[name]

    def _sweep(self, now: float) -> None:
        """Delete, once, what writers that were killed long ago left behind.

        now: in seconds, by the clock that gives files their times, which is not that of every host that writes here.
        """
        if not self._swept:
            self._swept = True
            for file in self.folder.glob(".partial-*.safetensors"):
                with suppress(OSError):  # another process sweeps too
                    if now - file.stat().st_mtime > ABANDONED:
                        file.unlink()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_maps": OrderedDict(), "_hold": None}  # another process opens its own
        return state if self._index is None else {"folder": self.folder, "labels": self.labels, "_hold": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {"_swept": False, "_index_seen": (), **state}
        if "_places" not in state:
            self._forget()
            self.refresh()


def contents(file: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of a safetensors file's tensors, in the order in which they lie.

    Raises:
        SafetensorError, OSError: the file is not whole, or is none.
        KeyError: it holds what no store writes.
    """
    with safe_open(file, framework="pt") as whole:
        for key in whole.offset_keys():
            tensor = whole.get_slice(key)
            yield key, DTYPES[tensor.get_dtype()], tuple(tensor.get_shape())


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without gradients and dropout."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def finite(values: Tensor, names: Sequence[str], dtype: torch.dtype, advice: str) -> Tensor:
    """`values`, one for each of `names` along the first dimension, in `dtype` on the CPU.

    Raises:
        ValueError: some are no numbers that `dtype` has; the message names whose and gives `advice`.
    """
    kept = values.to(dtype).cpu()
    for name, own in zip(names, kept, strict=True):
        if not bool(own.isfinite().all()):
            most = torch.finfo(dtype).max
            raise ValueError(f"{name}: what the encoder makes of it are not all numbers below {most:.6g}; {advice}")
    return kept
