"""``AutoencoderTiny``: a few plain convolutions in place of another autoencoder, with diffusers' name and weights.

After TAESD (Ollin Boer Bohan, 2023): residual blocks of three convolutions without normalisation or attention, trained
on the latents of a large autoencoder, as they are after scaling.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.dtypes import read_dtype
from latentdiff.models.autoencoder import Autoencoder, AutoencoderOutput, check_pixels
from latentdiff.models.bottlenecks import BottleneckOutput, Generators
from latentdiff.models.layers import Checkpointed
from latentdiff.models.single_file_networks import coder_checkpoints

ACTIVATIONS = ("relu", "silu", "swish", "gelu", "mish")
TILE = 512
"""Side of a tile in pixels at first, since the config has no ``sample_size``."""


class TinyBlock(nn.Module):
    """Three convolutions beside a shortcut. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), get_activation(activation)]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyCoder(Checkpointed):
    """Layers that are run in turn; a subclass says what comes before and after them."""

    layers: nn.Sequential

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.run(layer, x) if isinstance(layer, TinyBlock) else layer(x)
        return x


class TinyEncoder(TinyCoder):
    """(B, in_channels, H, W), values in [-1, 1] -> (B, latent_channels, h, w), h = H / 2^(levels - 1), rounded up.

    Args:
        config: of an `AutoencoderTiny`.

    Raises:
        ValueError: pictures with other channels, or too small for one latent.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, levels = config.encoder_block_out_channels[0], config.num_encoder_blocks
        self.in_channels, self.factor = config.in_channels, 2 ** (len(levels) - 1)
        layers: list[nn.Module] = []
        for i, blocks in enumerate(levels):
            first = i == 0
            layers.append(
                nn.Conv2d(config.in_channels, width, 3, padding=1)
                if first
                else nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
            )
            layers += [TinyBlock(width, config.act_fn) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self.in_channels, self.factor)
        return self.through(pixels.add(1).div(2))


class TinyDecoder(TinyCoder):
    """(B, latent_channels, h, w) -> (B, out_channels, H, W), H = h * 2^(levels - 1).

    Args:
        config: of an `AutoencoderTiny`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, levels = config.decoder_block_out_channels[0], config.num_decoder_blocks
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            get_activation(config.act_fn),
        ]
        for blocks in levels[:-1]:
            layers += [TinyBlock(width, config.act_fn) for _ in range(blocks)]
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        layers += [TinyBlock(width, config.act_fn) for _ in range(levels[-1])]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.through(torch.tanh(latents / 3) * 3).mul(2).sub(1)


class ByteBottleneck(nn.Module):
    """Latents as 8-bit colours and back, as diffusers' ``forward`` has it; gradients pass as if nothing was rounded.

    Args:
        magnitude, shift: a latent z is the colour z / (2 magnitude) + shift, from 0 to 1.
    """

    def __init__(self, magnitude: float, shift: float) -> None:
        super().__init__()
        self.magnitude, self.shift = magnitude, shift

    def forward(self, h: Tensor, sample: bool = False, generator: Generators = None) -> BottleneckOutput:
        colours = h.div(2 * self.magnitude).add(self.shift).clamp(0, 1)
        rounded = (colours * 255).round() / 255
        colours = colours + (rounded - colours).detach() if h.requires_grad else rounded
        return BottleneckOutput(colours.sub(self.shift).mul(2 * self.magnitude), {}, {})


class AutoencoderTiny(Autoencoder):
    """An autoencoder of a few plain convolutions, whose latents are another's after scaling: a drop-in ``vae``.

    The config is diffusers' ``AutoencoderTiny``'s. Latents have ``scaling_factor`` 1 and no spread. ``forward`` rounds
    them to 8 bits, as diffusers' does; ``encode`` and ``decode`` do not. Tiles are blended as by `AutoencoderKL`, and
    not as by diffusers' class of this name.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
        "shift_factor": (0.0, None),
    }
    _no_split_modules: ClassVar[list[str]] = ["TinyBlock"]
    _group_offload_block_modules: ClassVar[list[str]] = ["encoder", "decoder"]

    quant_conv = post_quant_conv = None

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        decoder_block_out_channels: Sequence[int] = (64, 64, 64, 64),
        act_fn: str = "relu",
        latent_channels: int = 4,
        num_encoder_blocks: Sequence[int] = (1, 3, 3, 3),
        num_decoder_blocks: Sequence[int] = (3, 3, 3, 1),
        latent_magnitude: float = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        block_out_channels: Sequence[int] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.check_choice("act_fn", ACTIVATIONS)
        for key in ("in_channels", "out_channels", "latent_channels"):
            self.per_level(key)
        levels = len(decoder_block_out_channels)
        for part in ("encoder", "decoder"):
            widths = self.per_level(f"{part}_block_out_channels", levels)
            self.per_level(f"num_{part}_blocks", levels, least=0)
            if len(set(widths)) > 1:
                self.refuse(f"{part}_block_out_channels", widths, "is not supported; all levels have the same channels")
        if block_out_channels is not None and tuple(block_out_channels) != tuple(decoder_block_out_channels):
            self.refuse("block_out_channels", block_out_channels, "differs from decoder_block_out_channels.")
        self.register_to_config(block_out_channels=decoder_block_out_channels, force_upcast=False)
        self.set_coders(TinyEncoder(self.config), TinyDecoder(self.config), TILE)
        self.bottleneck = ByteBottleneck(latent_magnitude, latent_shift)

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
        """Load TAESD's own files; the shape is inferred from the weights.

        ::

            AutoencoderTiny.from_single_file("taesd_encoder.safetensors", decoder="taesd_decoder.safetensors")

        Args:
            source: the encoder's file, or one with both parts, named ``taesd_encoder.`` and ``taesd_decoder.``.
            decoder: the decoder's file, where there are two.
            others: as for other autoencoders.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else or lacks weights.
            TypeError: an unknown argument.
        """
        from latentdiff.interchange.single_file import read_taesd

        dtype = read_dtype(hub.pop("torch_dtype", None) or dtype)
        files = coder_checkpoints(cls, source, decoder, allow_pickle, hub)
        model: Self = read_taesd(files, cls, dtype)
        return model

    @property
    def last_weight(self) -> Tensor:
        weight: Tensor = self.decoder.layers[-1].weight
        return weight

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """(B, C, H, W), values in [-1, 1] -> ``.latents`` (B, C, h, w)."""
        latents = self.encode_moments(x)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, x: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, h, w) -> ``.sample`` (B, C, H, W), about [-1, 1].

        ``generator`` is there because diffusers' pipelines pass one; nothing is random.
        """
        sample = self.decode_latents(x)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        return_dict: bool = True,
        sample_posterior: bool = False,
        generator: Generators = None,
    ) -> AutoencoderOutput | tuple[Tensor]:
        """(B, C, H, W) to latents of 8 bits and back: ``.sample``, and ``.bottleneck``, which has no losses."""
        bottleneck = self.bottleneck(self.encode_moments(sample))
        reconstruction = self.decode_latents(bottleneck.latents)
        return AutoencoderOutput(reconstruction, bottleneck=bottleneck) if return_dict else (reconstruction,)
