"""Autoencoders whose latents are codes: ``VQModel``, with diffusers' name, config keys and weights, and two more that
diffusers has no class for, ``GumbelVQModel`` and ``FSQModel``.

Latent Diffusion (Rombach et al. 2022), Sec. 3.1; Taming Transformers (Esser et al. 2021), Sec. 3.1.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.models.autoencoder import Autoencoder, AutoencoderOutput
from latentdiff.models.bottlenecks import (
    BottleneckOutput,
    FiniteScalarQuantizer,
    Generators,
    GumbelQuantizer,
    VectorQuantizer,
)

MARGIN = 0.1
"""Values are squeezed from [0, 1] into [MARGIN, 1 - MARGIN], since the logit of 0 and of 1 is infinite."""
NARROWEST = 1 / 255
"""Least width, about a third of a grey level. On plain surfaces the likelihood would otherwise grow without bound."""


class CodeAutoencoder(Autoencoder):
    """What the autoencoders with codes share. Subclasses set ``quant_conv``, ``quantize`` and ``post_quant_conv``.

    A picture's codes are whole numbers: `encode_to_indices` gives them, `decode_from_indices` draws them.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"norm_type": ("group",)}
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["quantize"]

    @property
    def bottleneck(self) -> Any:
        return self.quantize

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """(B, C, H, W), values in [-1, 1] -> ``.latents`` (B, C, h, w), not yet quantized."""
        latents = self.encode_moments(x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def encode_to_indices(self, x: Tensor) -> Tensor:
        """(B, C, H, W), values in [-1, 1] -> the codes' indices, (B, h, w) int64 from 0 to the number of codes - 1."""
        return self.quantize.nearest(self.encode_moments(x))

    @apply_forward_hook
    def decode_from_indices(self, indices: Tensor) -> Tensor:
        """The codes' indices, (B, h, w) of whole numbers -> (B, C, H, W), about [-1, 1].

        Raises:
            ValueError: they are not whole numbers of that shape, or there is no such code.
        """
        if indices.ndim != 3 or indices.is_floating_point():
            raise ValueError(
                f"indices must be whole numbers of shape (B, h, w), not {indices.dtype} of {tuple(indices.shape)}"
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codes:
            raise ValueError(
                f"indices must lie from 0 to {self.codes - 1}, not from {int(indices.min())} to {int(indices.max())}"
            )
        return self.decode_latents(self.quantize.lookup(indices.long()).to(self.dtype))

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return self.quantize.codes

    @apply_forward_hook
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: Sequence[int] | None = None,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Unscaled latents (B, C, h, w) -> ``.sample`` (B, C, H, W), about [-1, 1], and ``.commit_loss``.

        They are quantized first, or not with ``force_not_quantize``. If so, and if the config says
        ``lookup_from_codebook``, ``h`` holds the codes' indices and ``shape`` is (B, h, w, C). ``generator`` is there
        because diffusers' pipelines pass one; nothing is random.
        """
        if not force_not_quantize:
            bottleneck = self.quantize(h, sample=False)
            latents, loss = bottleneck.latents, commit_loss(bottleneck)
        elif self.config.get("lookup_from_codebook"):
            if shape is None:
                raise ValueError(f"{type(self).__name__}.decode: indices need shape=(batch, height, width, channels).")
            latents = self.quantize.lookup(h.reshape(tuple(shape)[:3]))
            loss = latents.new_zeros(len(latents))
        else:
            latents, loss = h, h.new_zeros(len(h))
        sample = self.decode_latents(latents)
        return DecoderOutput(sample=sample, commit_loss=loss) if return_dict else (sample, loss)

    def forward(
        self,
        sample: Tensor,
        return_dict: bool = True,
        sample_posterior: bool = False,
        generator: Generators = None,
    ) -> AutoencoderOutput | tuple[Tensor, Tensor]:
        """(B, C, H, W) to codes and back: ``.sample``, ``.commit_loss``, and ``.bottleneck``.

        ``sample_posterior`` and ``generator`` matter where codes are drawn (`GumbelVQModel` in training).
        """
        h = self.encode_moments(sample)
        bottleneck = self.quantize(h, sample_posterior, generator)
        raw, loss = self.decode_raw(bottleneck.latents), commit_loss(bottleneck)
        reconstruction = self.pixels_of(raw)
        return AutoencoderOutput(reconstruction, loss, bottleneck, h, raw) if return_dict else (reconstruction, loss)


class CodebookAutoencoder(CodeAutoencoder):
    """What the autoencoders with a codebook share: their config, whose further keys are in ``neutral``."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        mid_block_add_attention: bool = True,
        force_upcast: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.per_level("num_vq_embeddings")
        self.build(latent_channels, num_vq_embeddings, vq_embed_dim or latent_channels)

    def build(self, channels: int, codes: int, code_dim: int) -> None:
        """Make encoder and decoder, which work on latents of `channels`, and a codebook between them."""
        raise NotImplementedError


class VQModel(CodebookAutoencoder):
    """Autoencoder with a codebook: every latent vector is replaced by the nearest of ``num_vq_embeddings``.

    The config is diffusers' ``VQModel``'s. ``decode`` takes, besides what diffusers' takes, the ``generator`` that the
    Stable Diffusion pipelines pass.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = CodeAutoencoder.neutral | {"lookup_from_codebook": (False, True)}

    def build(self, channels: int, codes: int, code_dim: int) -> None:
        self.build_coders(encoder_channels=channels)
        self.quant_conv = nn.Conv2d(channels, code_dim, 1)
        self.quantize = VectorQuantizer(codes, code_dim)
        self.post_quant_conv = nn.Conv2d(code_dim, channels, 1)


class LogitLaplace:
    """The logit-Laplace distribution of a picture's values: for each a location and a width, instead of the value.

    DALL-E (Ramesh et al. 2021), Appendix A.3, Eq. 2.

    The logit of a squeezed value follows a Laplace distribution, so that values lie within the range of pixels.

    Args:
        parameters: (B, 2C, H, W), locations of the logits and logarithms of their widths, in this order.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.location, log_width = parameters.float().chunk(2, dim=1)  # (B, C, H, W) each
        self.width = log_width.clamp(max=20.0).exp() + NARROWEST

    @property
    def pixels(self) -> Tensor:
        """(B, C, H, W) float32, the values at the locations: the medians, in [-1.25, 1.25]."""
        return (self.location.sigmoid() - 0.5) * 2 / (1 - 2 * MARGIN)

    def nll(self, pixels: Tensor) -> Tensor:
        """Negative log-likelihood of pixels (B, C, H, W) in [-1, 1], in nats of a squeezed value; of the same shape."""
        squeezed = 0.5 + 0.5 * (1 - 2 * MARGIN) * pixels.float()
        slope = squeezed * (1 - squeezed)
        return (squeezed.logit() - self.location).abs() / self.width + torch.log(2 * self.width * slope)


class GumbelVQModel(CodebookAutoencoder):
    """Autoencoder whose encoder gives a distribution over codes, as DALL-E's discrete VAE (Ramesh et al. 2021).

    The config is `VQModel`'s, and ``logit_laplace``: the decoder gives a distribution of every value, as DALL-E's does,
    ``sample`` is its median, and training can use its likelihood. diffusers has no such class. In training,
    ``forward(..., sample_posterior=True)`` draws relaxed codes at ``quantize.temperature``; everywhere else the
    likeliest code is taken.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = CodeAutoencoder.neutral | {"logit_laplace": (False, True)}

    def build(self, channels: int, codes: int, code_dim: int) -> None:
        given = self.config.out_channels * (2 if self.config.logit_laplace else 1)
        self.build_coders(encoder_channels=channels, decoder_channels=given)
        self.quant_conv = nn.Conv2d(channels, channels, 1)
        self.quantize = GumbelQuantizer(channels, codes, code_dim)
        self.post_quant_conv = nn.Conv2d(code_dim, channels, 1)

    def pixels_of(self, raw: Tensor) -> Tensor:
        return LogitLaplace(raw).pixels.to(raw.dtype) if self.config.logit_laplace else raw


class FSQModel(CodeAutoencoder):
    """Autoencoder whose latents are rounded to a few ``levels`` in each of their channels (Mentzer et al. 2023).

    The config is `VQModel`'s, with ``levels`` in place of the codebook; diffusers has no such class.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        sample_size: int = 32,
        levels: Sequence[int] = (8, 5, 5, 5),
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        mid_block_add_attention: bool = True,
        force_upcast: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.per_level("levels", len(levels), least=2)
        self.build_coders(encoder_channels=latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, len(levels), 1)
        self.quantize = FiniteScalarQuantizer(levels)
        self.post_quant_conv = nn.Conv2d(len(levels), latent_channels, 1)


def commit_loss(bottleneck: BottleneckOutput) -> Tensor:
    """diffusers' name for the sum of a bottleneck's losses."""
    losses = list(bottleneck.losses.values())
    return torch.stack(losses).sum() if losses else bottleneck.latents.new_zeros(())
