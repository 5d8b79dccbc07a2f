"""Digests of networks and of what they are given."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LENGTH = 40  # hexadecimal digits, 160 bits


def digest(*parts: object) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


def digest_of_weights(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes, dtypes and bytes; the same on every device."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()[:LENGTH]


def plain_config(config: Any, *left_out: str) -> dict[str, Any]:
    """A model's config without its private keys and those of `left_out`, at every depth."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    return {
        key: plain_config(value, *left_out) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not str(key).startswith("_") and key not in left_out
    }
