"""What users call: pipelines that tie text encoder, UNet, scheduler and decoder together."""

from typing import TYPE_CHECKING, Any

from latentdiff.imports import load_module
from latentdiff.pipelines.registry import KINDS

if TYPE_CHECKING:
    from latentdiff.pipelines.batch.many import draw_many
    from latentdiff.pipelines.core.output import ImagesOutput
    from latentdiff.pipelines.core.pipeline import LatentPipeline
    from latentdiff.pipelines.core.previews import filmstrip
    from latentdiff.pipelines.core.sampling import Progress
    from latentdiff.pipelines.tasks.class_conditional import ClassConditionalPipeline
    from latentdiff.pipelines.tasks.dit import DiTPipeline
    from latentdiff.pipelines.tasks.image_to_image import ImageToImagePipeline
    from latentdiff.pipelines.tasks.inpaint import InpaintPipeline
    from latentdiff.pipelines.tasks.pixart import (
        PixArtImageToImagePipeline,
        PixArtInpaintPipeline,
        PixArtTextToImagePipeline,
    )
    from latentdiff.pipelines.tasks.sdxl import (
        SDXLImageToImagePipeline,
        SDXLInpaintPipeline,
        SDXLTextToImagePipeline,
    )
    from latentdiff.pipelines.tasks.super_resolution import SuperResolutionPipeline
    from latentdiff.pipelines.tasks.text_to_image import TextToImagePipeline
    from latentdiff.pipelines.tasks.tokens import TokenPipeline
    from latentdiff.pipelines.tasks.tokens_inpaint import TokenInpaintPipeline
    from latentdiff.pipelines.tasks.tokens_textless import ClassTokenPipeline, UnconditionalTokenPipeline
    from latentdiff.pipelines.tasks.unconditional import UnconditionalPipeline
    from latentdiff.pipelines.tasks.variations import ImageVariationPipeline

_HOMES = {kind.name: kind.module for kind in KINDS} | {
    "ImagesOutput": "latentdiff.pipelines.core.output",
    "LatentPipeline": "latentdiff.pipelines.core.pipeline",
    "Progress": "latentdiff.pipelines.core.sampling",
    "draw_many": "latentdiff.pipelines.batch.many",
    "filmstrip": "latentdiff.pipelines.core.previews",
}

__all__ = [
    "ClassConditionalPipeline",
    "ClassTokenPipeline",
    "DiTPipeline",
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "ImagesOutput",
    "InpaintPipeline",
    "LatentPipeline",
    "PixArtImageToImagePipeline",
    "PixArtInpaintPipeline",
    "PixArtTextToImagePipeline",
    "Progress",
    "SDXLImageToImagePipeline",
    "SDXLInpaintPipeline",
    "SDXLTextToImagePipeline",
    "SuperResolutionPipeline",
    "TextToImagePipeline",
    "TokenInpaintPipeline",
    "TokenPipeline",
    "UnconditionalPipeline",
    "UnconditionalTokenPipeline",
    "draw_many",
    "filmstrip",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentdiff.pipelines' has no attribute {name!r}")
    return getattr(load_module(_HOMES[name]), name)
