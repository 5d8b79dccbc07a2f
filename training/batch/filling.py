"""Filling a cache: what is missing is encoded, each process its share, and interruptions change no batch."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.training.batch.cache import TensorStore
from latentdiff.training.loop.estimate import ProgressLines

logger = logging.getLogger(__name__)

SHARD_TENSORS, SHARD_SECONDS, SHARD_BYTES = 4096, 30.0, 2**27  # a shard is written when one of these is reached

Batches = list[list[str]]  # of keys


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
        store.index()
    accelerator.wait_for_everyone()
    store.refresh()
    if lost := store.missing(keys):
        raise OSError(
            f"{store.folder}: {len(lost)} of {len(keys)} {things} are not there after all were encoded; let cache_dir "
            f"be a folder that all processes see, and delete nothing in it meanwhile"
        )


def is_filled(store: TensorStore, what: str | None, accelerator: Accelerator, things: str) -> bool:
    """Whether a store holds all that is wanted, as was noted under `what`, so that no process has to look.

    what: a digest of all that decides on what is wanted; None: look.
    """
    if what is None:
        return False
    held = torch.tensor(float(store.holds(what)), device=accelerator.device)
    if float(accelerator.reduce(held, "sum")) < accelerator.num_processes:
        return False
    if accelerator.is_main_process:
        logger.info("all %s are encoded, as a run before has found", things)
    return True


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
