"""What users call: pipelines that tie text encoder, UNet, scheduler and decoder together."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pipelines.base import LatentPipeline
    from latentdiff.pipelines.class_conditional import ClassConditionalPipeline
    from latentdiff.pipelines.drawing import ImagesOutput, Progress
    from latentdiff.pipelines.image_to_image import ImageToImagePipeline
    from latentdiff.pipelines.inpaint import InpaintPipeline
    from latentdiff.pipelines.many import draw_many
    from latentdiff.pipelines.previews import filmstrip
    from latentdiff.pipelines.super_resolution import SuperResolutionPipeline
    from latentdiff.pipelines.text_to_image import TextToImagePipeline
    from latentdiff.pipelines.unconditional import UnconditionalPipeline
    from latentdiff.pipelines.variations import ImageVariationPipeline

_HOMES = {
    "ClassConditionalPipeline": "class_conditional",
    "ImageToImagePipeline": "image_to_image",
    "ImageVariationPipeline": "variations",
    "ImagesOutput": "drawing",
    "InpaintPipeline": "inpaint",
    "LatentPipeline": "base",
    "Progress": "drawing",
    "SuperResolutionPipeline": "super_resolution",
    "TextToImagePipeline": "text_to_image",
    "UnconditionalPipeline": "unconditional",
    "draw_many": "many",
    "filmstrip": "previews",
}

__all__ = [
    "ClassConditionalPipeline",
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "ImagesOutput",
    "InpaintPipeline",
    "LatentPipeline",
    "Progress",
    "SuperResolutionPipeline",
    "TextToImagePipeline",
    "UnconditionalPipeline",
    "draw_many",
    "filmstrip",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentdiff.pipelines' has no attribute {name!r}")
    return getattr(import_module(f"latentdiff.pipelines.{_HOMES[name]}"), name)
