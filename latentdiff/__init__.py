"""latentdiff: latent text-to-image diffusion, from a folder of captioned pictures to ``pipeline("a red car")``.

The names below load what they need when they are first used; ``import latentdiff`` itself costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latentdiff.models import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
    from latentdiff.pipelines import (
        ClassConditionalPipeline,
        ImageToImagePipeline,
        ImageVariationPipeline,
        InpaintPipeline,
        SuperResolutionPipeline,
        TextToImagePipeline,
        UnconditionalPipeline,
    )

_HOMES = {
    "AutoencoderKL": "latentdiff.models",
    "UNet2DConditionModel": "latentdiff.models",
    "UNet2DModel": "latentdiff.models",
    "VQModel": "latentdiff.models",
    "ClassConditionalPipeline": "latentdiff.pipelines",
    "ImageToImagePipeline": "latentdiff.pipelines",
    "ImageVariationPipeline": "latentdiff.pipelines",
    "InpaintPipeline": "latentdiff.pipelines",
    "SuperResolutionPipeline": "latentdiff.pipelines",
    "TextToImagePipeline": "latentdiff.pipelines",
    "UnconditionalPipeline": "latentdiff.pipelines",
}

__all__ = [
    "AutoencoderKL",
    "ClassConditionalPipeline",
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "InpaintPipeline",
    "SuperResolutionPipeline",
    "TextToImagePipeline",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UnconditionalPipeline",
    "VQModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
