"""Tokenizers of transformers, which keep what a call asks of them, used so that nothing of it stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

_LOCK = RLock()
"""Held while a tokenizer works: in threads, with each other's options, they fail or cut wrongly."""


@contextmanager
def tokenizing(tokenizer: Any) -> Iterator[None]:
    """Within, the tokenizer is this thread's; afterwards it pads and cuts as before, which is saved with it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    with _LOCK:
        before = None if backend is None else (backend.truncation, backend.padding)
        try:
            yield
        finally:
            if backend is not None and before is not None:
                truncation, padding = before
                if backend.truncation != truncation:
                    backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
                if backend.padding != padding:
                    backend.no_padding() if padding is None else backend.enable_padding(**padding)
