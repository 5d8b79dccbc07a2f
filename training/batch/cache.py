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
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.shared_cache import Hold, exclusive, trim
from latentdiff.training.loop.estimate import ProgressLines

logger = logging.getLogger(__name__)

DIGEST = 40  # hexadecimal digits of a digest, 160 bits
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I16": torch.int16, "I32": torch.int32}
OPEN_SHARDS = 1024  # memory maps kept at a time; they hold no file open
ABANDONED = 86_400.0  # seconds after which a half-written shard has no writer any more
START_BITS = 48  # of a place, for the offset in the shard; the rest is the number of its kind
SHARD_TENSORS, SHARD_SECONDS, SHARD_BYTES = 4096, 30.0, 2**27  # a shard is written when one of these is reached

Batches = list[list[str]]  # of keys


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


class TensorStore:
    """Tensors by key, in `folder`, which is made when first written to.

    Keys are digests: what is stored under a key never changes. A tensor that comes back is a copy.

    Args:
        labels: of what is written, for `shared_cache.Shard.labels`.
    """

    def __init__(self, folder: Path, labels: Mapping[str, str] | None = None) -> None:
        self.folder = Path(folder)
        self.labels = dict(labels or {})
        root = shared_folder()
        self._hold = Hold(self.folder) if self.folder.absolute().is_relative_to(root) else None
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
            numbers = {self._places[key] >> START_BITS for key in keys if key in self._places}
            self._hold.add({self._kinds[number].shard for number in numbers})
        return None

    def trim(self) -> None:
        """Keep the folder that a user's runs share within its limit."""
        if self._hold is not None:
            trim(shared_folder())

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
        return {**self.__dict__, "_maps": OrderedDict(), "_hold": None}  # another process opens its own


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


def fill(
    store: TensorStore,
    keys: Sequence[str],
    encode: Callable[[Batches], Iterator[Mapping[str, Tensor]]],
    accelerator: Accelerator,
    *,
    batch_size: int,
    kind: Callable[[str], Any] = lambda key: None,
    things: str,
) -> None:
    """Encode what is missing, each process its share, and wait for the others.

    Args:
        keys: distinct.
        encode: yields the tensors of each batch.
        kind: what the keys of a batch must have in common.
        things: what the keys stand for, in messages.

    Raises:
        OSError: the disk is full, or the processes do not see the same folder.
    """
    store.claim(keys)
    missing = set(store.missing(keys))
    if missing and accelerator.is_main_process:
        logger.info("%d %s to encode, %d are there already", len(missing), things, len(keys) - len(missing))
    batches = plan(share(keys, accelerator.process_index, accelerator.num_processes), missing, batch_size, kind)
    total = sum(map(len, batches))
    hidden = True if not accelerator.is_main_process or not total else None  # None: unless there is no terminal
    progress = ProgressLines(total, f"{things} encoded")
    try:
        with ShardWriter(store) as writer, tqdm(total=total, desc=f"encoding {things}", disable=hidden) as bar:
            for tensors in encode(batches):
                writer.add(tensors)
                bar.update(len(tensors))
                progress.update(len(tensors), accelerator.is_main_process and bool(bar.disable))
    except (KeyboardInterrupt, SystemExit):
        if accelerator.is_main_process:
            kept = len(keys) - len(store.missing(keys))
            logger.warning("stopped while encoding; %d of %d %s are encoded and kept", kept, len(keys), things)
        raise
    accelerator.wait_for_everyone()
    store.claim(keys)
    if accelerator.is_main_process:
        store.trim()
    if lost := store.missing(keys):
        raise OSError(
            f"{store.folder}: {len(lost)} of {len(keys)} {things} are not there after all were encoded; let cache_dir "
            f"be a folder that all processes see, and delete nothing in it meanwhile"
        )


def share(keys: Iterable[str], rank: int, processes: int) -> list[str]:
    """One process's share of the work.

    It depends on the keys alone: processes that check at different moments see different keys as missing.
    """
    return [key for key in keys if int(key[:8], 16) % processes == rank]


def plan(keys: Sequence[str], missing: set[str], size: int, kind: Callable[[str], Any]) -> Batches:
    """The missing keys in batches.

    A network's output for one input depends, in its last digits, on the others in the batch. So a batch that was lost
    by an interruption is encoded again as the same batch.
    """
    batches = in_batches(keys, size, kind)
    whole = [batch for batch in batches if missing.issuperset(batch)]
    rest = [key for batch in batches if not missing.issuperset(batch) for key in batch if key in missing]
    return whole + in_batches(rest, size, kind)


def in_batches(keys: Iterable[str], size: int, kind: Callable[[str], Any]) -> Batches:
    """Keys in batches of at most `size`, all of a batch of one kind."""
    alike: dict[Any, list[str]] = {}
    for key in keys:
        alike.setdefault(kind(key), []).append(key)
    return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]


class ShardWriter:
    """A context that gathers tensors into shards. What it was given is kept even where an error ends the work."""

    def __init__(self, store: TensorStore) -> None:
        self.store = store
        self._waiting: dict[str, Tensor] = {}
        self._bytes, self._since = 0, time.monotonic()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self._waiting |= tensors
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        due = len(self._waiting) >= SHARD_TENSORS or self._bytes >= SHARD_BYTES
        if due or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, {}, 0
        self.store.write(waiting)
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, first: BaseException | None, _trace: Any) -> None:
        try:
            self.flush()
        except OSError as error:
            if first is None:
                raise
            logger.warning("what was encoded last is lost: %s", error)  # the first error is the one to report


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
