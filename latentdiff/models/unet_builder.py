"""From a config to the blocks of a UNet: one builder for the UNet with text, one for that without."""

from typing import Any

from torch import nn

from latentdiff.models.layers import Downsample2D, GridAttention, ResnetBlock2D, Upsample2D, double, halve
from latentdiff.models.transformer import SpatialTransformer
from latentdiff.models.unet_blocks import DownBlock, MidBlock, UpBlock
from latentdiff.models.unet_config import UNetLevels


class UNetBuilder:
    """Makes the blocks. Subclasses say what attention they have and what changes the resolution.

    Args:
        time_dim: width of the time embedding.
    """

    def __init__(self, config: Any, levels: UNetLevels, time_dim: int) -> None:
        self.config, self.levels, self.time_dim = config, levels, time_dim
        self.last = len(levels.channels) - 1

    def attention(self, level: int, depth: int, *, middle: bool = False) -> nn.Module:
        raise NotImplementedError

    def downsampler(self, level: int) -> nn.Module:
        raise NotImplementedError

    def upsampler(self, level: int) -> nn.Module:
        raise NotImplementedError

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

    def down_blocks(self) -> nn.ModuleList:
        return nn.ModuleList(self.down_block(level) for level in range(self.last + 1))

    def down_block(self, level: int) -> DownBlock:
        channels = self.levels.channels
        widths = [channels[max(level - 1, 0)]] + [channels[level]] * (self.levels.layers[level] - 1)
        return DownBlock(
            [self.resnet(width, channels[level]) for width in widths],
            [self.attention(level, depth) for depth in self.levels.down[level]],
            None if level == self.last else self.downsampler(level),
        )

    def mid_block(self) -> MidBlock:
        """Two resnet blocks; a subclass may have another number."""
        return self._middle(resnets=2)

    def _middle(self, resnets: int) -> MidBlock:
        width = self.levels.channels[-1]
        attentions = [self.attention(self.last, depth, middle=True) for depth in self.levels.middle]
        return MidBlock([self.resnet(width, width) for _ in range(resnets)], attentions)

    def up_blocks(self) -> nn.ModuleList:
        skips = self.skip_channels()
        blocks, width = nn.ModuleList(), self.levels.channels[-1]
        for level, depths in zip(range(self.last, -1, -1), self.levels.up, strict=True):
            out = self.levels.channels[level]
            widths = [width] + [out] * self.levels.layers[level]
            block = UpBlock(
                [self.resnet(before + skips.pop(), out) for before in widths],
                [self.attention(level, depth) for depth in depths],
                None if level == 0 else self.upsampler(level),
            )
            blocks.append(block)
            width = out
        return blocks

    def skip_channels(self) -> list[int]:
        """The channels of what ``conv_in`` and the way down leave for the way up, in their order."""
        skips = [self.levels.channels[0]]
        for level, (channels, layers) in enumerate(zip(self.levels.channels, self.levels.layers, strict=True)):
            skips += [channels] * (layers + (level < self.last))
        return skips


class TextUNetBuilder(UNetBuilder):
    """Transformers with cross-attention, and convolutions that halve and double."""

    def attention(self, level: int, depth: int, *, middle: bool = False) -> SpatialTransformer:
        return SpatialTransformer(
            self.levels.channels[level],
            heads=self.levels.heads[level],
            depth=depth,
            text_dim=self.levels.text_dims[level],
            groups=self.config.norm_num_groups,
            linear=self.config.use_linear_projection,
            only_cross=self.levels.only_cross[level] and not middle,
        )

    def downsampler(self, level: int) -> Downsample2D:
        return Downsample2D(self.levels.channels[level])

    def upsampler(self, level: int) -> Upsample2D:
        return Upsample2D(self.levels.channels[level])

    def mid_block(self) -> MidBlock:
        return self._middle(resnets=1 + len(self.levels.middle))


class PlainUNetBuilder(UNetBuilder):
    """Self-attention, and convolutions or resnet blocks that halve and double."""

    def attention(self, level: int, depth: int, *, middle: bool = False) -> GridAttention:
        groups = self.config.norm_num_groups
        if middle and self.config.attn_norm_num_groups is not None:
            groups = self.config.attn_norm_num_groups
        elif middle and self.config.resnet_time_scale_shift != "default":
            groups = None
        width, heads = self.levels.channels[level], self.levels.heads[level]
        return GridAttention(width, groups=groups, eps=self.config.norm_eps, heads=heads)

    def downsampler(self, level: int) -> nn.Module:
        width = self.levels.channels[level]
        if is_resnet(self.config.down_block_types[level], self.config.downsample_type):
            return self.resnet(width, width, resample=halve)
        return Downsample2D(width, padding=self.config.downsample_padding)

    def upsampler(self, level: int) -> nn.Module:
        width = self.levels.channels[level]
        if is_resnet(self.config.up_block_types[self.last - level], self.config.upsample_type):
            return self.resnet(width, width, resample=double)
        return Upsample2D(width)


def is_resnet(block: str, sampling: str) -> bool:
    """Whether a block of that name changes the resolution by a resnet block.

    `sampling`, "conv" or "resnet", concerns blocks with attention; the others are named for theirs.
    """
    return block.startswith("Resnet") or ("Attn" in block and sampling == "resnet")
