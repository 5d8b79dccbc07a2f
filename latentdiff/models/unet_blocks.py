"""The UNet's blocks: one resolution on the way down, the middle, one resolution on the way up; and what builds them.

A block runs its resnet blocks, each followed by an attention or none of them. All take the time embedding after its
SiLU, (B or 1, D), and, in a UNet with cross-attention, the text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor, nn

from latentdiff.models.layers import (
    Checkpointed,
    Downsample2D,
    GridAttention,
    ResnetBlock2D,
    Upsample2D,
    double,
    halve,
)
from latentdiff.models.transformer import SpatialTransformer, Text
from latentdiff.models.unet_config import UNetLevels


class Block(Checkpointed):
    """Resnet blocks, each followed by an attention or none of them.

    A block with attention has it in ``attentions``; a block without lacks the attribute: diffusers goes by that.
    """

    def add_attentions(self, attentions: Sequence[nn.Module]) -> None:
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def attend(self, index: int, x: Tensor, text: Text | None) -> Tensor:
        """The attention of that number, if the block has any: (B, C, H, W) -> (B, C, H, W)."""
        if not hasattr(self, "attentions"):
            return x
        attention = self.attentions[index]
        return attention(x) if isinstance(attention, GridAttention) else attention(x, text)


class DownBlock(Block):
    def __init__(
        self, resnets: Sequence[ResnetBlock2D], attentions: Sequence[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.add_attentions(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(
        self, x: Tensor, time: Tensor, text: Text | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> (B, C', H/2, W/2) and the output of every layer, for the way up.

        ``residual``, a T2I-Adapter's, is added to the output: with attention before the size is halved, else after.
        """
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, self.run(resnet, x, time), text)
            skips.append(x)
        if residual is not None and hasattr(self, "attentions"):
            x = skips[-1] = x + residual
        for downsample in self.downsamplers:
            x = downsample(x) if isinstance(downsample, Downsample2D) else self.run(downsample, x, time)
            skips.append(x)
        if residual is not None and not hasattr(self, "attentions"):
            x = skips[-1] = x + residual
        return x, skips


class MidBlock(Block):
    """Resnet block, attention, resnet block; or without attention one resnet block or more."""

    def __init__(self, resnets: Sequence[ResnetBlock2D], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.add_attentions(attentions)  # before the resnet blocks, as in diffusers: an optimizer counts parameters
        self.resnets = nn.ModuleList(resnets)

    def forward(self, x: Tensor, time: Tensor, text: Text | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        for i, resnet in enumerate(self.resnets):
            if i:
                x = self.attend(0, x, text)
            x = self.run(resnet, x, time)
        return x


class UpBlock(Block):
    def __init__(
        self, resnets: Sequence[ResnetBlock2D], attentions: Sequence[nn.Module], upsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.add_attentions(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])
        self.freeu: tuple[float, float] | None = None

    def forward(
        self,
        x: Tensor,
        skips: Sequence[Tensor],
        time: Tensor,
        text: Text | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """(B, C, H, W) and as many skips as resnet blocks, the last first -> (B, C', *size).

        The last block of the way up does not change the size: -> (B, C', H, W).
        """
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            if self.freeu is not None:
                x, skip = reweighed(x, skip, *self.freeu)
            x = self.attend(i, self.run(resnet, torch.cat([x, skip], dim=1), time), text)
        for upsample in self.upsamplers:
            x = upsample(x, size) if isinstance(upsample, Upsample2D) else self.run(upsample, x, time, size)
        return x


def reweighed(x: Tensor, skip: Tensor, skip_scale: float, backbone_scale: float) -> tuple[Tensor, Tensor]:
    """FreeU (Si et al. 2023), Eqs. 4 to 6: half of the backbone's channels up, the low frequencies of the skip down."""
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half] * backbone_scale, x[:, half:]], dim=1)
    return x, fourier_filter(skip, threshold=1, scale=skip_scale)


class UNetBuilder:
    """Makes the blocks that a config asks for.

    Args:
        time_dim: width of the time embedding.
    """

    def __init__(self, config: Any, levels: UNetLevels, time_dim: int) -> None:
        self.config, self.levels, self.time_dim = config, levels, time_dim
        self.last = len(levels.channels) - 1

    def down_blocks(self) -> nn.ModuleList:
        blocks, width = nn.ModuleList(), self.levels.channels[0]
        for level, depths in enumerate(self.levels.down):
            out = self.levels.channels[level]
            widths = [width] + [out] * (self.levels.layers[level] - 1)
            block = DownBlock(
                [self.resnet(before, out) for before in widths],
                [self.attention(level, depth) for depth in depths],
                None if level == self.last else self.downsampler(level),
            )
            blocks.append(block)
            width = out
        return blocks

    def mid_block(self) -> MidBlock:
        width = self.levels.channels[-1]
        attentions = [self.attention(self.last, depth, middle=True) for depth in self.levels.middle]
        return MidBlock([self.resnet(width, width) for _ in range(self.levels.middle_resnets)], attentions)

    def up_blocks(self) -> nn.ModuleList:
        levels, skips = self.levels, [self.levels.channels[0]]  # of conv_in and the way down
        for level, (channels, layers) in enumerate(zip(levels.channels, levels.layers, strict=True)):
            skips += [channels] * (layers + (level < self.last))
        blocks, width = nn.ModuleList(), levels.channels[-1]
        for level, depths in zip(range(self.last, -1, -1), levels.up, strict=True):
            out = levels.channels[level]
            widths = [width] + [out] * levels.layers[level]
            block = UpBlock(
                [self.resnet(before + skips.pop(), out) for before in widths],
                [self.attention(level, depth) for depth in depths],
                None if level == 0 else self.upsampler(level),
            )
            blocks.append(block)
            width = out
        return blocks

    def resnet(self, in_channels: int, out_channels: int, resample: Any = None) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels,
            out_channels,
            groups=self.config.norm_num_groups,
            eps=self.config.norm_eps,
            time_dim=self.time_dim,
            scale_shift=self.config.resnet_time_scale_shift == "scale_shift",
            dropout=self.config.dropout,
            resample=resample,
        )

    def attention(self, level: int, depth: int, *, middle: bool = False) -> nn.Module:
        """A transformer with cross-attention, or self-attention in a UNet without text."""
        levels, config, groups = self.levels, self.config, self.config.norm_num_groups
        channels, heads = levels.channels[level], levels.heads[level]
        width = heads * levels.head_widths[level]
        if levels.text_dims:
            return SpatialTransformer(
                channels,
                heads=heads,
                width=width,
                depth=depth,
                text_dim=levels.text_dims[level],
                groups=groups,
                linear=config.use_linear_projection,
                only_cross=levels.only_cross[level] and not middle,
            )
        if middle and config.attn_norm_num_groups is not None:
            groups = config.attn_norm_num_groups
        elif middle and config.resnet_time_scale_shift != "default":
            groups = None
        return GridAttention(channels, groups=groups, eps=config.norm_eps, heads=heads, width=width)

    def downsampler(self, level: int) -> nn.Module:
        width = self.levels.channels[level]
        if self.levels.resnets_halve and self.levels.resnets_halve[level]:
            return self.resnet(width, width, resample=halve)
        return Downsample2D(width, padding=self.config.downsample_padding)

    def upsampler(self, level: int) -> nn.Module:
        width = self.levels.channels[level]
        if self.levels.resnets_double and self.levels.resnets_double[level]:
            return self.resnet(width, width, resample=double)
        return Upsample2D(width)
