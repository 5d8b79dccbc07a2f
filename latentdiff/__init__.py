"""latentdiff: latent text-to-image diffusion, from a folder of captioned pictures to ``pipeline("a red car")``.

The names below load what they need when they are first used; ``import latentdiff`` itself costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

from latentdiff.imports import load_module

if TYPE_CHECKING:
    __version__: str
    from latentdiff.models import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
    from latentdiff.pipelines import (
        ClassConditionalPipeline,
        ClassTokenPipeline,
        ImageToImagePipeline,
        ImageVariationPipeline,
        InpaintPipeline,
        SuperResolutionPipeline,
        TextToImagePipeline,
        TokenInpaintPipeline,
        TokenPipeline,
        UnconditionalPipeline,
        UnconditionalTokenPipeline,
    )

__all__ = [
    "AutoencoderKL",
    "ClassConditionalPipeline",
    "ClassTokenPipeline",
    "ImageToImagePipeline",
    "ImageVariationPipeline",
    "InpaintPipeline",
    "SuperResolutionPipeline",
    "TextToImagePipeline",
    "TokenInpaintPipeline",
    "TokenPipeline",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UnconditionalPipeline",
    "UnconditionalTokenPipeline",
    "VQModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("latentdiff")
        except PackageNotFoundError:  # a checkout that is not installed
            return "0.0"
    if name not in __all__:
        raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
    home = "latentdiff.pipelines" if name.endswith("Pipeline") else "latentdiff.models"
    return getattr(load_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
