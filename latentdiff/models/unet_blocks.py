"""The UNet's blocks: one resolution on the way down, the middle, one resolution on the way up.

A block with transformers has one after each resnet block, as deep as ``depths`` says; with no depths it has none. All
take the time embedding after its SiLU, (B or 1, D), an iterator over what the text is to the cross-attentions, of
which each takes the next, and the text's mask.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor, nn

from latentdiff.models.layers import Checkpointed, Downsample2D, ResnetBlock2D, Upsample2D, norm_silu
from latentdiff.models.text_context import TextInput

Transformers = Callable[..., nn.Module]
"""Makes what stands after a resnet block, as deep as ``depth`` says."""
Resnets = Callable[[int, int], ResnetBlock2D]
Resamplers = Callable[[int], nn.Module]
"""Makes what halves or doubles the resolution: a convolution, or a resnet block."""


class Block(Checkpointed):
    """A block with transformers has them as ``attentions``; one without lacks the attribute: diffusers goes by that."""

    def add_transformers(self, depths: Sequence[int], transformer: Transformers) -> None:
        if depths:
            self.attentions = nn.ModuleList(transformer(depth=depth) for depth in depths)

    @property
    def transformers(self) -> Sequence[nn.Module]:
        return getattr(self, "attentions", ())


class DownBlock(Block):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        depths: Sequence[int],
        resnet: Resnets,
        transformer: Transformers,
        resampler: Resamplers | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(resnet(width, out_channels) for width in widths)
        self.add_transformers(depths, transformer)
        self.downsamplers = nn.ModuleList([] if resampler is None else [resampler(out_channels)])

    def forward(
        self, x: Tensor, time: Tensor, text: Iterator[TextInput], mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> (B, C', H/2, W/2) and every layer's output, which the way up wants."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, time)
            if self.transformers:
                x = self.transformers[i](x, text, mask)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x) if isinstance(downsample, Downsample2D) else self.run(downsample, x, time)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Resnet block, transformer, resnet block; without a transformer there may be a single resnet block."""

    def __init__(
        self, channels: int, *, layers: int, depths: Sequence[int], resnet: Resnets, transformer: Transformers
    ) -> None:
        super().__init__()
        self.add_transformers(depths, transformer)
        self.resnets = nn.ModuleList(resnet(channels, channels) for _ in range(layers))

    def forward(self, x: Tensor, time: Tensor, text: Iterator[TextInput], mask: Tensor | None) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            if i and self.transformers:
                x = self.transformers[0](x, text, mask)
            x = self.run(resnet, x, time)
        return x


class UpBlock(Block):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        skip_channels: Sequence[int],
        depths: Sequence[int],
        resnet: Resnets,
        transformer: Transformers,
        resampler: Resamplers | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            resnet(width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.add_transformers(depths, transformer)
        self.upsamplers = nn.ModuleList([] if resampler is None else [resampler(out_channels)])
        self.freeu: tuple[float, float] | None = None

    def forward(
        self,
        x: Tensor,
        skips: Sequence[Tensor],
        time: Tensor,
        text: Iterator[TextInput],
        mask: Tensor | None,
        size: tuple[int, int] | None,
    ) -> Tensor:
        """(B, C, H, W) and the skips, the last of them first -> (B, C', *size), from the last block (B, C', H, W)."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            if self.freeu is not None:
                x, skip = reweighed(x, skip, *self.freeu)
            x = self.run(resnet, torch.cat([x, skip], dim=1), time)
            if self.transformers:
                x = self.transformers[i](x, text, mask)
        for upsample in self.upsamplers:
            x = upsample(x, size) if isinstance(upsample, Upsample2D) else self.run(upsample, x, time, size)
        return x


class UShaped:
    """A part of the UNets: ``conv_in``, the way down, the middle, the way up, ``conv_norm_out`` and ``conv_out``."""

    conv_in: nn.Module
    down_blocks: Any
    mid_block: Any
    up_blocks: Any
    conv_norm_out: nn.Module
    conv_out: nn.Module

    def _denoise(
        self,
        sample: Tensor,
        time: Tensor,
        text: Iterator[TextInput],
        mask: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        time = F.silu(time)
        x = self.conv_in(sample)  # (B, channels, H, W)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, time, text, mask)
            skips += outputs
        if residuals:
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=True)]
        if self.mid_block is not None:
            x = self.mid_block(x, time, text, mask)
        if mid_residual is not None:
            x = x + mid_residual
        for block in self.up_blocks:
            skips, taken = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            x = block(x, taken, time, text, mask, skips[-1].shape[-2:] if skips else None)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


def build_down(
    channels: Sequence[int],
    layers: Sequence[int],
    depths: Sequence[Sequence[int]],
    *,
    resnet: Resnets,
    transformer: Callable[[int], Transformers],
    resampler: Callable[[int], Resamplers],
) -> nn.ModuleList:
    """The blocks of the way down.

    Args:
        channels, layers, depths: of every level, from the full resolution down; how deep the transformers are.
        transformer, resampler: what makes those of a level.
    """
    last, before = len(channels) - 1, [channels[0], *channels]
    return nn.ModuleList(
        DownBlock(
            before[i],
            channels[i],
            layers=layers[i],
            depths=depths[i],
            resnet=resnet,
            transformer=transformer(i),
            resampler=None if i == last else resampler(i),
        )
        for i in range(len(channels))
    )


def build_up(
    channels: Sequence[int],
    layers: Sequence[int],
    depths: Sequence[Sequence[int]],
    *,
    resnet: Resnets,
    transformer: Callable[[int], Transformers],
    resampler: Callable[[int], Resamplers],
) -> nn.ModuleList:
    """The blocks of the way up; as `build_down`, but for `depths`, of which the lowest level's come first."""
    last, width = len(channels) - 1, channels[-1]
    skips = [channels[0]]  # the widths of what the way down leaves for the way up
    for i, number in enumerate(layers):
        skips += [channels[i]] * (number + (i < last))
    blocks = nn.ModuleList()
    for i, depth in zip(range(last, -1, -1), depths, strict=True):
        block = UpBlock(
            width,
            channels[i],
            skip_channels=[skips.pop() for _ in range(layers[i] + 1)],
            depths=depth,
            resnet=resnet,
            transformer=transformer(i),
            resampler=None if i == 0 else resampler(i),
        )
        blocks.append(block)
        width = channels[i]
    return blocks


def reweighed(x: Tensor, skip: Tensor, skip_scale: float, backbone_scale: float) -> tuple[Tensor, Tensor]:
    """FreeU (Si et al. 2023), Eqs. 4 to 6: half of the backbone's channels up, the low frequencies of the skip down."""
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half] * backbone_scale, x[:, half:]], dim=1)
    return x, fourier_filter(skip, threshold=1, scale=skip_scale)
