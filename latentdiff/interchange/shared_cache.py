"""The folder in which a user's runs share what they encode, and graphs for runtimes: how large it may be, what it has.

A run holds the files that it reads. Beyond the limit, and when the folder is cleared, only files go that nobody holds;
beyond the limit those first that were used longest ago. Nothing but files of caches is ever deleted.
"""

import logging
import os
import re
import shutil
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from latentdiff.interchange.cache_folder import gigabytes
from latentdiff.interchange.folders import read_json
from latentdiff.interchange.locks import NO_LOCKS, TAKEN, lock

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "LATENTDIFF_CACHE_GB"
LIMIT = 20.0  # GB, unless the variable says otherwise
KINDS = {"latents": "pictures", "masks": "masks", "text": "captions"}
"""Folders in it, and what their files were encoded from."""
GRAPHS = "runtimes"
"""The folder with graphs in it, a folder for each model, runtime and precision."""
GRAPHS_OF = re.compile(r"[a-z]+-[a-z0-9]+-[0-9a-f]{32}")
GRAPHS_SAY = "runtime.json"
"""In each of these, what it is of."""
STORE = re.compile(r"[0-9a-f]{40}")
SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")
HELD = re.compile(r"\.held-[0-9a-f]{32}")
LOCK, INDEX, NOTE = ".lock", ".index", ".filled-"
PATIENCE = 60.0  # seconds to wait for a lock that is kept for moments


def size_limit() -> int:
    """How many bytes the folder may hold. Raises ValueError if ``LATENTDIFF_CACHE_GB`` is no such number."""
    return gigabytes(LIMIT_VARIABLE, LIMIT)


class Hold:
    """A process's claim to some files of a store, which lasts until the end of the object or the process."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._file: BinaryIO | None = None

    def add(self, names: Iterable[str]) -> None:
        """Claim files, and note that they are used now; they may be about to be written. To be called `exclusive`."""
        names = sorted(names)
        for name in names:
            with suppress(OSError):
                os.utime(self.store / name)
        if names and self._file is None:
            path = self.store / f".held-{uuid.uuid4().hex}"
            self._file = path.open("ab", buffering=0)
            with suppress(OSError):  # where there are no locks nothing is deleted
                lock(self._file)
            weakref.finalize(self, _let_go, self._file, path, os.getpid())
        if self._file is not None:
            self._file.write("".join(f"{name}\n" for name in names).encode())


def _let_go(file: BinaryIO, path: Path, process: int) -> None:
    file.close()
    if os.getpid() == process:  # and no fork of it
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(store: Path, patience: float = PATIENCE) -> Iterator[bool]:
    """Within, no other process deletes from a store, or claims what is in it; false where that cannot be made sure.

    Raises:
        OSError: another process keeps the lock for longer than `patience` seconds.
    """
    store.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with (store / LOCK).open("ab") as file:
        while True:
            try:
                lock(file)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    yield False
                    return
                if error.errno not in TAKEN or time.monotonic() > end:
                    raise OSError(
                        error.errno, f"{file.name} is locked by another process, which does not go on"
                    ) from None
                time.sleep(0.02)
            else:
                yield True
                return


def held_names(store: Path) -> set[str]:
    """The files that some process holds; what processes that are gone have left is removed."""
    names: set[str] = set()
    for path in store.glob(".held-*"):
        if not HELD.fullmatch(path.name):
            continue
        try:
            with path.open("rb") as file:
                try:
                    lock(file)
                except OSError:
                    names.update(file.read().decode().split())
                    continue
            path.unlink()
        except FileNotFoundError:
            continue
    return names


@dataclass(frozen=True)
class Shard:
    """A file of the cache, or a folder of graphs. size: in bytes. used: when last, seconds since 1970."""

    path: Path
    size: int
    used: float

    @property
    def kind(self) -> str:
        """What was encoded, or "graphs"."""
        return KINDS.get(self.path.parent.parent.name, "graphs")

    def labels(self) -> dict[str, str]:
        """Of what and by what its content was made, "data" and "model", as far as it says; of graphs, for what."""
        from safetensors import SafetensorError, safe_open

        try:
            if self.kind == "graphs":
                said = read_json(self.path / GRAPHS_SAY)
                model = {"model": said["model"]} if isinstance(said.get("model"), str) else {}
                return {"data": f"{said.get('runtime')} in {said.get('precision')}", **model}
            with safe_open(self.path, framework="np") as whole:
                return dict(whole.metadata() or {})
        except (OSError, SafetensorError, ValueError):
            return {}


def shards(root: Path) -> list[Shard]:
    """All files of the caches in `root`, and folders of graphs, those first that were used longest ago."""
    found = []
    for path in (root / GRAPHS).glob("*"):
        if GRAPHS_OF.fullmatch(path.name) and not path.is_symlink():
            with suppress(FileNotFoundError, NotADirectoryError):
                (path / GRAPHS_SAY).stat()  # or it is no such folder
                sizes = [file.lstat().st_size for file in path.rglob("*") if not file.is_dir()]
                found.append(Shard(path, sum(sizes), path.stat().st_mtime))
    for kind in KINDS:
        for path in (root / kind).glob("*/*.safetensors"):
            if STORE.fullmatch(path.parent.name) and SHARD.fullmatch(path.name) and not path.is_symlink():
                with suppress(FileNotFoundError):
                    state = path.stat()
                    found.append(Shard(path, state.st_size, state.st_mtime))
    return sorted(found, key=lambda shard: shard.used)


def delete(some: Sequence[Shard], enough: Callable[[int], bool] = lambda freed: False) -> tuple[int, list[Shard]]:
    """Delete files of the cache in their order, until it is enough or what remains is held.

    Args:
        enough: whether so many bytes are.

    Returns:
        The bytes that were freed, and the files that stay because a process holds them.
    """
    freed, kept = 0, []
    with ExitStack() as locks:
        held: dict[Path, set[str] | None] = {}
        for shard in some:
            if enough(freed):
                break
            store = shard.path.parent
            if store not in held:
                held[store] = None  # which means all
                with suppress(OSError):
                    if locks.enter_context(exclusive(store, patience=0)):
                        held[store] = held_names(store)
            names = held[store]
            if names is None or shard.path.name in names:
                kept.append(shard)
                continue
            if shard.kind == "graphs":
                gone = store / f".gone-{uuid.uuid4().hex}"  # whole or not at all
                with suppress(FileNotFoundError):
                    os.rename(shard.path, gone)
                shutil.rmtree(gone, ignore_errors=True)
            else:
                shard.path.unlink(missing_ok=True)
                for other in (store / INDEX, *store.glob(f"{NOTE}*")):  # they speak of all of them
                    other.unlink(missing_ok=True)
            freed += shard.size
    return freed, kept


def trim(root: Path) -> None:
    """Delete what was used longest ago, until the folder is within its limit; warn if what is in use is more."""
    most, found = size_limit(), shards(root)
    total = sum(shard.size for shard in found)
    if total <= most:
        return
    freed, _ = delete(found, lambda freed: total - freed <= most)
    if freed:
        logger.info("%s: %.3g GB were deleted that were used longest ago", root, freed / 1e9)
    if total - freed > most:
        logger.warning(
            "%s holds %.3g GB and may hold %.3g; running trainings use them, or pipelines with a runtime. %s "
            "allows more, cache_dir=FOLDER keeps a training's own elsewhere",
            *(root, (total - freed) / 1e9, most / 1e9, LIMIT_VARIABLE),
        )
