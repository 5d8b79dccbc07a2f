"""The UNet's blocks: one resolution on the way down, the middle, one resolution on the way up.

A block with transformers has one after each resnet block; a block without has an empty list of them. All take the
time embedding after its SiLU, (B or 1, D), an iterator over the text's keys and values, of which every
cross-attention takes the next, and the text's mask.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor, nn

from latentdiff.models.layers import Checkpointed, Downsample2D, ResnetBlock2D, Upsample2D
from latentdiff.models.text_context import KeyValue
from latentdiff.models.transformer import SpatialTransformer

Transformers = Callable[[], SpatialTransformer] | None
Resnets = Callable[[int, int], ResnetBlock2D]


class DownBlock(Checkpointed):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        resnet: Resnets,
        transformer: Transformers,
        last: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(resnet(width, out_channels) for width in widths)
        self.attentions = nn.ModuleList(transformer() for _ in widths if transformer is not None)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(out_channels)])

    def forward(
        self, x: Tensor, time: Tensor, text: Iterator[KeyValue], mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> (B, C', H/2, W/2) and every layer's output, which the way up wants."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, time)
            if self.attentions:
                x = self.attentions[i](x, text, mask)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Checkpointed):
    """Resnet block, transformer, resnet block; without a transformer a single resnet block."""

    def __init__(self, channels: int, *, resnet: Resnets, transformer: Transformers) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([] if transformer is None else [transformer()])
        self.resnets = nn.ModuleList(resnet(channels, channels) for _ in range(1 + len(self.attentions)))

    def forward(self, x: Tensor, time: Tensor, text: Iterator[KeyValue], mask: Tensor | None) -> Tensor:
        x = self.run(self.resnets[0], x, time)
        if self.attentions:
            x = self.attentions[0](x, text, mask)
            x = self.run(self.resnets[1], x, time)
        return x


class UpBlock(Checkpointed):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        skip_channels: Sequence[int],
        resnet: Resnets,
        transformer: Transformers,
        last: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            resnet(width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.attentions = nn.ModuleList(transformer() for _ in widths if transformer is not None)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(out_channels)])
        self.freeu: tuple[float, float] | None = None

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, text: Iterator[KeyValue], mask: Tensor | None
    ) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W), or the size of the skip that comes next. Takes its skips off the list."""
        for i, resnet in enumerate(self.resnets):
            skip = skips.pop()
            if self.freeu is not None:
                x, skip = reweighed(x, skip, *self.freeu)
            x = self.run(resnet, torch.cat([x, skip], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, text, mask)
        for upsample in self.upsamplers:
            x = upsample(x, size=skips[-1].shape[-2:])
        return x


def reweighed(x: Tensor, skip: Tensor, skip_scale: float, backbone_scale: float) -> tuple[Tensor, Tensor]:
    """FreeU (Si et al. 2023), Eqs. 4 to 6: half of the backbone's channels up, the low frequencies of the skip down."""
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half] * backbone_scale, x[:, half:]], dim=1)
    return x, fourier_filter(skip, threshold=1, scale=skip_scale)
