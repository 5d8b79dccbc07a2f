"""Precisions that users name."""

from collections.abc import Mapping
from typing import Any


def read_dtype(value: Any) -> Any:
    """A ``torch.dtype`` as it is, or by its name, such as "float16"; of a mapping each; None is None.

    Raises:
        ValueError: it is none.
    """
    import torch

    if value is None or isinstance(value, torch.dtype):
        return value
    if isinstance(value, Mapping):
        return {name: read_dtype(one) for name, one in value.items()}
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={value!r} is no precision; give one of torch's, such as torch.float16 or 'float16'")
    return found
