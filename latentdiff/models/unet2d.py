"""``UNet2DModel``: the denoiser without text of DDPM, Improved DDPM and ADM, with diffusers' names, keys and weights.

DDPM (Ho et al. 2020), App. B; Improved DDPM (Nichol & Dhariwal 2021); ADM (Dhariwal & Nichol 2021), Sec. 3: attention
at several resolutions, heads of fixed width, adaptive group normalisation (``resnet_time_scale_shift="scale_shift"``),
resnet blocks that halve and double (``"resnet"``), class embeddings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from latentdiff.models.config import StrictConfig, check_choice, check_multiple, per_level
from latentdiff.models.layers import (
    Downsample2D,
    GridAttention,
    ResnetBlock2D,
    SdpaModel,
    Upsample2D,
    double,
    halve,
)
from latentdiff.models.single_file import ReleasedNetwork
from latentdiff.models.text_context import TextInput
from latentdiff.models.unet_blocks import MidBlock, Resamplers, UShaped, build_down, build_up
from latentdiff.models.unet_time import TimeConditioned

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


class SelfAttention(GridAttention):
    """Where the blocks of a UNet with text have a transformer."""

    def forward(self, x: Tensor, text: Iterator[TextInput] | None = None, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class UNet2DModel(ReleasedNetwork, UShaped, TimeConditioned, SdpaModel, ModelMixin, StrictConfig):
    """Predicts noise (or v, or the picture), and maybe variances, from pixels or latents, a timestep and a class.

    The config is that of diffusers' class, and ``attention_head_dim`` is what it says, the width of a head (None: one
    head). Beyond diffusers' it may be a list, one for each level: heads of a fixed number, as Improved DDPM has them.
    ``downsample_type`` and ``upsample_type`` are of the blocks with attention; those without are named for theirs,
    ``DownBlock2D`` or ``ResnetDownsampleBlock2D``.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "center_input_sample": (False,),
        "time_embedding_type": ("positional",),
        "mid_block_scale_factor": (1,),
    }
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ResnetBlock2D", "SelfAttention", "UpBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | Sequence[int] | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        widths = check_unet(self.config)
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.build_blocks(widths, time_dim=self.build_time())
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)

    def build_blocks(self, head_widths: Sequence[int], time_dim: int) -> None:
        config = self.config
        parts = down_parts(config, head_widths, time_dim)

        def upsampler(level: int) -> Resamplers:
            if is_resnet(config.up_block_types[-1 - level], config.upsample_type):
                return lambda width: parts.made["resnet"](width, width, resample=double)
            return Upsample2D

        up = [(1,) * (config.layers_per_block + 1) if "Attn" in kind else () for kind in config.up_block_types]
        self.down_blocks = build_down(*parts.sizes, parts.depths, resampler=parts.resampler, **parts.made)
        self.up_blocks = build_up(*parts.sizes, up, resampler=upsampler, **parts.made)
        self.mid_block = None if config.mid_block_type is None else middle_block(config, parts)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Noisy pixels or latents (B, C, H, W), timestep (one, or (B,)), labels (B,) -> ``.sample`` (B, C', H, W).

        Raises:
            ValueError: labels are given and the UNet has no class embeddings, or the other way round.
        """
        time = self.embed_time(timestep, sample.device, sample.dtype, class_labels)
        output = self._denoise(sample, time, repeat(sample))  # in the place of text, at which nobody looks
        return UNet2DOutput(sample=output) if return_dict else (output,)


class DownParts(NamedTuple):
    """What a config says of the way down."""

    sizes: tuple[Sequence[int], Sequence[int]]
    """Channels and layers of every level."""
    depths: list[tuple[int, ...]]
    resampler: Callable[[int], Resamplers]
    made: dict[str, Any]
    """What makes resnet blocks and attentions."""


def down_parts(config: Any, head_widths: Sequence[int], time_dim: int) -> DownParts:
    """What `build_down` takes, for a config that `check_blocks` has seen."""
    channels, layers = config.block_out_channels, config.layers_per_block
    resnet = partial(
        ResnetBlock2D,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        time_dim=time_dim,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        dropout=config.dropout,
    )

    def attention(level: int, groups: int | None = config.norm_num_groups) -> Any:
        heads = channels[level] // head_widths[level]
        return lambda depth: SelfAttention(channels[level], groups=groups, eps=config.norm_eps, heads=heads)

    def downsampler(level: int) -> Resamplers:
        if is_resnet(config.down_block_types[level], config.downsample_type):
            return lambda width: resnet(width, width, resample=halve)
        return partial(Downsample2D, padding=config.downsample_padding)

    depths = [(1,) * layers if "Attn" in kind else () for kind in config.down_block_types]
    sizes = channels, (layers,) * len(channels)
    return DownParts(sizes, depths, downsampler, {"resnet": resnet, "transformer": attention})


def middle_block(config: Any, parts: DownParts) -> MidBlock:
    groups = config.attn_norm_num_groups
    if groups is None and config.resnet_time_scale_shift == "default":
        groups = config.norm_num_groups
    return MidBlock(
        config.block_out_channels[-1],
        layers=2,
        depths=(1,) if config.add_attention else (),
        resnet=parts.made["resnet"],
        transformer=parts.made["transformer"](len(config.block_out_channels) - 1, groups),
    )


def is_resnet(block: str, sampling: str) -> bool:
    """Whether a block of that name changes the resolution by a resnet block."""
    return block.startswith("Resnet") or ("Attn" in block and sampling == "resnet")


def check_unet(config: Any) -> tuple[int, ...]:
    """The width of a head at every level. Raises ValueError with key and value for what the UNet cannot be."""
    name = "UNet2DModel"
    check_choice(name, "mid_block_type", config.mid_block_type, ("UNetMidBlock2D", None))
    check_choice(name, "class_embed_type", config.class_embed_type, (None, "timestep", "identity"))
    check_choice(name, "down_block_types", config.down_block_types, DOWN_BLOCKS)
    check_choice(name, "up_block_types", config.up_block_types, UP_BLOCKS)
    check_choice(name, "upsample_type", config.upsample_type, ("conv", "resnet"))
    per_level(name, "out_channels", config.out_channels, 1)
    return check_blocks(name, config, ["down_block_types", "up_block_types"])


def check_blocks(name: str, config: Any, kinds: Sequence[str]) -> tuple[int, ...]:
    """The same for what the way down and the middle are; `kinds`: the keys of the blocks' types."""
    levels = len(config.block_out_channels)
    channels = per_level(name, "block_out_channels", config.block_out_channels, levels)
    check_choice(name, "act_fn", config.act_fn, ("silu", "swish"))
    check_choice(name, "resnet_time_scale_shift", config.resnet_time_scale_shift, ("default", "scale_shift"))
    check_choice(name, "downsample_padding", config.downsample_padding, (0, 1))
    check_choice(name, "downsample_type", config.downsample_type, ("conv", "resnet"))
    for key in kinds:
        if len(config[key]) != levels:
            raise ValueError(f"{name}: {key}={config[key]!r} has {len(config[key])} entries for {levels} levels.")
    for key in ("in_channels", "layers_per_block", "norm_num_groups"):
        per_level(name, key, config[key], 1)
    check_multiple(name, "block_out_channels", channels, "norm_num_groups", [config.norm_num_groups] * levels)
    given = config.attention_head_dim
    widths = channels if given is None else per_level(name, "attention_head_dim", given, levels)
    ways = [config[key][::-1] if key == "up_block_types" else config[key] for key in kinds]
    attends = [any("Attn" in kind for kind in level) for level in zip(*ways, strict=True)]
    attends[-1] = attends[-1] or (config.mid_block_type is not None and config.add_attention)
    for width, head, there in zip(channels, widths, attends, strict=True):
        if there:
            check_multiple(name, "block_out_channels", [width], "attention_head_dim", [head])
    return widths
