"""Digests of networks and of what they are given."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentdiff.interchange.fingerprint import weights_digest

LENGTH = 40  # hexadecimal digits, 160 bits


def digest(*parts: object) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


def digest_of_weights(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes, dtypes and bytes; the same on every device."""
    return weights_digest(tensors)[:LENGTH]


def plain_config(config: Any, *left_out: str) -> dict[str, Any]:
    """A model's config without its private keys and those of `left_out`, at every depth."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    return {
        key: plain_config(value, *left_out) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not str(key).startswith("_") and key not in left_out
    }
