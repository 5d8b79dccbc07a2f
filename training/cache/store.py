"""Tensors in a folder, found by what they were made of.

The folder holds safetensors files ("shards"), each written whole under a name of its own and never changed. So any
number of processes and runs can add to one folder at once, an interruption loses only what was not yet written, and
reading needs no lock. Tensors are read where they lie, through the operating system's memory map.
"""

import logging
import math
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
OPEN_SHARDS = 1024  # memory maps kept at a time; they hold no file open
ABANDONED = 86_400.0  # seconds after which a half-written shard has no writer any more
START_BITS = 48  # of a place, for the offset in the shard; the rest is the number of its kind


@dataclass(frozen=True, slots=True)
class Kind:
    """What many tensors of a shard have in common."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorStore:
    """Tensors by key, in `folder`, which is made when first written to.

    Keys are digests: what is stored under a key never changes. A tensor that comes back is a copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._swept = False
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._places: dict[str, int] = {}  # whole numbers, because there may be millions
        self._kinds: list[Kind] = []
        self._sizes: dict[str, int] = {}  # of each shard that was looked at, in bytes
        self._maps: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not stored, each once, in their order."""
        return [key for key in dict.fromkeys(keys) if key not in self._places]

    def __getitem__(self, key: str) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            KeyError: there is none.
            OSError: its file was deleted or changed.
        """
        number, start = divmod(self._places[key], 1 << START_BITS)
        kind = self._kinds[number]
        content = self._map(kind.shard)[start : start + kind.nbytes].clone()
        return content.view(kind.dtype).reshape(kind.shape)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors of float16, bfloat16 or float32, as one new shard.

        Raises:
            OSError: it cannot be written; then nothing of it remains.
        """
        if not tensors:
            return
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        name = f"{uuid.uuid4().hex}.safetensors"
        partial = self.folder / f".partial-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / name)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.folder}: {len(content):,} bytes could not be written ({error.strerror}); make room, "
                f"or choose another cache_dir. What was there before is whole",
            ) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        self._look_at(name)

    def refresh(self) -> None:
        """See what other processes have written, and what was deleted."""
        present = list(self._shards())
        if not self._sizes.keys() <= set(present):
            self._forget()
        for name in present:
            if name not in self._sizes:
                self._look_at(name)

    def _shards(self) -> Iterator[str]:
        if self.folder.is_dir():
            for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
                if entry.name.endswith(".safetensors") and not entry.name.startswith(".") and entry.is_file():
                    yield entry.name

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
            self._places.setdefault(key, numbers[kind] << START_BITS | start)
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

    def _sweep(self) -> None:
        """Delete, once, what writers that were killed long ago left behind."""
        if not self._swept:
            self._swept = True
            for file in self.folder.glob(".partial-*.safetensors"):
                with suppress(OSError):  # another process sweeps too
                    if time.time() - file.stat().st_mtime > ABANDONED:
                        file.unlink()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}  # another process opens its own


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
