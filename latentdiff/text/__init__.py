"""Prompts to text states (B, L, D), with the tokenizers and encoders of transformers and open_clip."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.text.encode import as_prompts, encode_prompts, max_tokens
    from latentdiff.text.load import load_text_encoder
    from latentdiff.text.open_clip import convert_text_tower, load_open_clip_text_encoder

_HOMES = {
    "as_prompts": "latentdiff.text.encode",
    "convert_text_tower": "latentdiff.text.open_clip",
    "encode_prompts": "latentdiff.text.encode",
    "load_open_clip_text_encoder": "latentdiff.text.open_clip",
    "load_text_encoder": "latentdiff.text.load",
    "max_tokens": "latentdiff.text.encode",
}

__all__ = [
    "as_prompts",
    "convert_text_tower",
    "encode_prompts",
    "load_open_clip_text_encoder",
    "load_text_encoder",
    "max_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentdiff.text' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
