"""Composed pictures and their captions, made by worker processes into memory that all processes share."""

import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..drawings import Job, read_bundle
from ..synonym_pairs import with_synonyms
from .text import CutTokenizer

CHUNK = 64  # pictures that a worker composes before it says so


@dataclass
class Pool:
    """N pictures in shared memory; those whose `ready` is 1 are there.

    Attributes:
        pictures: (N, H, W, 3) uint8.
        tokens: (N, K, L) uint16, captions as rows of the cut embedding, the plainest first.
        counts: (N,) uint8, how many of the K captions there are.
        ready: (N,) uint8.
    """

    pictures: NDArray[np.uint8]
    tokens: NDArray[np.uint16]
    counts: NDArray[np.uint8]
    ready: NDArray[np.uint8]

    @classmethod
    def empty(cls, number: int, size: int, captions: int, length: int) -> "Pool":
        return cls(
            _shared((number, size, size, 3), np.uint8),
            _shared((number, captions, length), np.uint16),
            _shared((number,), np.uint8),
            _shared((number,), np.uint8),
        )

    def wait(self, share: float, seconds: float = 120.0) -> None:
        """Return when at least `share` of the pictures are there.

        Raises:
            RuntimeError: they are not within so many seconds.
        """
        begun = time.monotonic()
        while self.ready.mean() < share:
            if time.monotonic() - begun > seconds:
                raise RuntimeError(f"only {self.ready.mean():.1%} of the pictures were composed in {seconds:.0f} s")
            time.sleep(0.05)


def read_jobs(bundle: Path) -> list[Job]:
    """The drawings of a bundle; captions also call them by the words of `synonyms.txt`."""
    jobs = read_bundle(bundle)
    named = with_synonyms(job.concept for job in jobs)
    return [replace(job, concept=named[job.concept.hexcode]) for job in jobs]


def _shared(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array of zeros that forked processes share; unlike /dev/shm it has no limit of its own."""
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(dtype).itemsize), dtype=dtype, count=count).reshape(shape)


def fill(pool: Pool, compose: Callable[[int], Any], text: Path, workers: int) -> list[Any]:
    """Start `workers` forked processes that fill the pool; they end by themselves. Returns them.

    compose: gives the scene of an index (`scenes.Composer`). Start them before anything uses a GPU in this process.
    """
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_work, args=(pool, compose, text, number, workers), daemon=True)
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    return processes


def _work(pool: Pool, compose: Callable[[int], Any], text: Path, number: int, workers: int) -> None:
    os.nice(5)
    most, length = pool.tokens.shape[1:]
    tokenizer = CutTokenizer(text, length)
    for start in range(number * CHUNK, len(pool.ready), workers * CHUNK):
        stop = min(start + CHUNK, len(pool.ready))
        for index in range(start, stop):
            scene = compose(index)
            captions = [caption for caption in scene.captions if tokenizer.knows(caption)][:most] or [""]
            pool.pictures[index] = scene.picture
            pool.tokens[index, : len(captions)] = tokenizer(captions)
            pool.counts[index] = len(captions)
        pool.ready[start:stop] = 1
