"""The UNet's blocks: one resolution on the way down, the middle, one resolution on the way up.

A block runs its resnet blocks, each followed by an attention or none of them. All take the time embedding after its
SiLU, (B or 1, D), and, in a UNet with cross-attention, the text.
"""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor, nn

from latentdiff.models.layers import Checkpointed, Downsample2D, ResnetBlock2D, Upsample2D
from latentdiff.models.text_context import Text


class Block(Checkpointed):
    """A block with attention has it in ``attentions``; a block without lacks the attribute: diffusers goes by that."""

    def add_attentions(self, attentions: Sequence[nn.Module]) -> None:
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def attend(self, index: int, x: Tensor, text: Text | None) -> Tensor:
        """The attention of that number, if the block has any: (B, C, H, W) -> (B, C, H, W)."""
        if not hasattr(self, "attentions"):
            return x
        attention = self.attentions[index]
        return attention(x) if text is None else attention(x, text)


class DownBlock(Block):
    def __init__(
        self, resnets: Sequence[ResnetBlock2D], attentions: Sequence[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.add_attentions(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, time: Tensor, text: Text | None = None) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> (B, C', H/2, W/2) and the output of every layer, for the way up."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.attend(i, self.run(resnet, x, time), text)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x) if isinstance(downsample, Downsample2D) else self.run(downsample, x, time)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Resnet block, attention, resnet block; or without attention one resnet block or more."""

    def __init__(self, resnets: Sequence[ResnetBlock2D], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.add_attentions(attentions)
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
