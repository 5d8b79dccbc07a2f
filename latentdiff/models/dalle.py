"""``DalleAutoencoder``: the discrete autoencoder of DALL-E, an encoder to codes and a decoder from them.

Zero-Shot Text-to-Image Generation (Ramesh et al. 2021), Sec. 2.1 and Appendix A; computed as the released code does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latentdiff.dtypes import read_dtype
from latentdiff.models.autoencoder import check_pixels
from latentdiff.models.bottlenecks import GumbelQuantizer
from latentdiff.models.codes import MARGIN, CodeAutoencoder, LogitLaplace
from latentdiff.models.layers import Checkpointed
from latentdiff.models.network import downscale_factor
from latentdiff.models.single_file_networks import coder_checkpoints

ENCODER_KERNELS, DECODER_KERNELS = (3, 3, 3, 1), (1, 3, 3, 3)


class DalleBlock(nn.Module):
    """Four convolutions, each of what is above 0, beside a shortcut: (B, C, h, w) -> (B, C', h, w).

    Args:
        kernels: the sides of the convolutions.
        gain: of what they give; one over the square of the number of blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels // 4] * 3 + [out_channels]
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], size, padding=size // 2) for i, size in enumerate(kernels)
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.relu(h))
        return self.shortcut(x) + self.gain * h


def levels(before: int, widths: Sequence[int], blocks: int, kernels: Sequence[int]) -> nn.ModuleList:
    """Of each width so many blocks; `before` channels come in."""
    found, gain = nn.ModuleList(), 1 / (len(widths) * blocks) ** 2
    for width in widths:
        found.append(
            nn.ModuleList(DalleBlock(before if i == 0 else width, width, kernels, gain) for i in range(blocks))
        )
        before = width
    return found


class DalleEncoder(Checkpointed):
    """(B, in_channels, H, W), values in [-1, 1] -> (B, C, h, w), of which `GumbelQuantizer` makes logits."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.in_channels, self.factor = config.in_channels, downscale_factor(config)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 7, padding=3)
        self.levels = levels(channels[0], channels, config.layers_per_block, ENCODER_KERNELS)

    def forward(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self.in_channels, self.factor)
        x = self.conv_in(0.5 + (0.5 - MARGIN) * pixels)  # values from MARGIN to 1 - MARGIN
        for number, level in enumerate(self.levels):
            if number:
                x = F.max_pool2d(x, 2)
            for block in level:  # type: ignore[attr-defined]
                x = self.run(block, x)
        return F.relu(x)


class DalleDecoder(Checkpointed):
    """Codes' vectors (B, code_dim, h, w) -> (B, 2 out_channels, H, W), what `LogitLaplace` takes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        self.levels = levels(config.code_dim, channels, config.layers_per_block, DECODER_KERNELS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.out_channels, 1)

    def forward(self, latents: Tensor) -> Tensor:
        x = latents
        for number, level in enumerate(self.levels):
            if number:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            for block in level:  # type: ignore[attr-defined]
                x = self.run(block, x)
        return self.conv_out(F.relu(x))


class DalleAutoencoder(CodeAutoencoder):
    """DALL-E's autoencoder: pictures to codes of 8 x 8 pixels, of which there are 8192, and back.

    ::

        vqvae = DalleAutoencoder.from_single_file("encoder.pkl", decoder="decoder.pkl", allow_pickle=True)
        vqvae.save_pretrained("dalle-vae")  # for latentdiff train prior --autoencoder dalle-vae

    As of a `GumbelVQModel` the likeliest code is taken, and drawn in training with ``sample_posterior=True``. The
    encoder's last convolution is ``quantize.proj`` here, and the decoder's first one ``quantize.embedding``. diffusers
    has no such class.

    Args:
        block_out_channels: of each level; each is half as large as the one before.
        code_dim: of a code's vector.
        latent_channels: of what the encoder gives, as many as on its last level.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    _no_split_modules: ClassVar[list[str]] = ["DalleBlock", "GumbelQuantizer"]
    _group_offload_block_modules: ClassVar[list[str]] = ["encoder", "decoder", "quantize"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (256, 512, 1024, 2048),
        layers_per_block: int = 2,
        latent_channels: int = 2048,
        num_vq_embeddings: int = 8192,
        code_dim: int = 128,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        for key in ("in_channels", "out_channels", "layers_per_block", "num_vq_embeddings", "code_dim"):
            self.per_level(key)
        widths = self.per_level("block_out_channels", len(block_out_channels))
        self.check_multiple("block_out_channels", widths, 4, "what a block's convolutions divide by")
        if latent_channels != widths[-1]:
            self.refuse("latent_channels", latent_channels, f"must be {widths[-1]}, of the last level.")
        self.set_coders(DalleEncoder(self.config), DalleDecoder(self.config), sample_size)
        self.quant_conv = self.post_quant_conv = None
        self.quantize = GumbelQuantizer(widths[-1], num_vq_embeddings, code_dim)

    def pixels_of(self, raw: Tensor) -> Tensor:
        return LogitLaplace(raw).pixels.to(raw.dtype)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        decoder: str | Path | None = None,
        dtype: torch.dtype | None = torch.float32,
        allow_pickle: bool = False,
        **hub: Any,
    ) -> Self:
        """Load the two files that OpenAI released, ``encoder.pkl`` and ``decoder.pkl``; shapes tell the config.

        They are pickles of whole modules, of which tensors alone are read; nothing in them is run.

        Args:
            source: the encoder's file, or one with the weights of both, named ``encoder.`` and ``decoder.``.
            decoder: the decoder's file, where there are two.
            others: as for other autoencoders.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights.
            TypeError: an unknown argument.
        """
        from latentdiff.interchange.single_file.dalle import read_dalle

        dtype = read_dtype(hub.pop("torch_dtype", None) or dtype)
        files = coder_checkpoints(cls, source, decoder, allow_pickle, hub)
        model: Self = read_dalle(files, cls, dtype)
        return model
