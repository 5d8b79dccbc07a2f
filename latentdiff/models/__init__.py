"""The networks: autoencoders, UNets, transformers, a classifier; with diffusers' names, config keys and weights."""

from typing import TYPE_CHECKING, Any

from latentdiff.imports import load_module

if TYPE_CHECKING:
    from latentdiff.models.autoencoder import AutoencoderKL
    from latentdiff.models.bottlenecks import BottleneckOutput, DiagonalGaussianDistribution
    from latentdiff.models.classifier import NoisyClassifier
    from latentdiff.models.codes import FSQModel, GumbelVQModel, VQModel
    from latentdiff.models.dalle import DalleAutoencoder
    from latentdiff.models.dit import DiTTransformer2DModel
    from latentdiff.models.identity import IdentityAutoencoder
    from latentdiff.models.pixart import PixArtTransformer2DModel
    from latentdiff.models.tiny_autoencoder import AutoencoderTiny
    from latentdiff.models.token_transformer import TokenTransformer
    from latentdiff.models.transformer import TextContext
    from latentdiff.models.unet import UNet2DConditionModel
    from latentdiff.models.unet_textless import UNet2DModel

_HOMES = {
    "AutoencoderKL": "autoencoder",
    "AutoencoderTiny": "tiny_autoencoder",
    "BottleneckOutput": "bottlenecks",
    "DiagonalGaussianDistribution": "bottlenecks",
    "DalleAutoencoder": "dalle",
    "DiTTransformer2DModel": "dit",
    "FSQModel": "codes",
    "GumbelVQModel": "codes",
    "IdentityAutoencoder": "identity",
    "NoisyClassifier": "classifier",
    "PixArtTransformer2DModel": "pixart",
    "TextContext": "transformer",
    "TokenTransformer": "token_transformer",
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet_textless",
    "VQModel": "codes",
}

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "BottleneckOutput",
    "DalleAutoencoder",
    "DiTTransformer2DModel",
    "DiagonalGaussianDistribution",
    "FSQModel",
    "GumbelVQModel",
    "IdentityAutoencoder",
    "NoisyClassifier",
    "PixArtTransformer2DModel",
    "TextContext",
    "TokenTransformer",
    "UNet2DConditionModel",
    "UNet2DModel",
    "VQModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentdiff.models' has no attribute {name!r}")
    return getattr(load_module(f"latentdiff.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
