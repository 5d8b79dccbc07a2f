"""Imports of libraries that have thousands of modules."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


@contextmanager
def collector_paused() -> Iterator[None]:
    """Within, Python does not look for cycles of objects that nobody uses any more.

    Imports of torch, diffusers and transformers make very many objects, and all of them stay. To look through them
    again and again was a fifth of the time of a cold start.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load_module(name: str) -> ModuleType:
    """``import_module`` of something large."""
    with collector_paused():
        return import_module(name)
