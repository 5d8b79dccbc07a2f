"""What users call: pipelines that tie text encoder, UNet, scheduler and decoder together."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pipelines.base import LatentPipeline
    from latentdiff.pipelines.text_to_image import TextToImagePipeline

_HOMES = {
    "LatentPipeline": "latentdiff.pipelines.base",
    "TextToImagePipeline": "latentdiff.pipelines.text_to_image",
}

__all__ = ["LatentPipeline", "TextToImagePipeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentdiff.pipelines' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
