"""The UNet's blocks: one resolution on the way down, the middle, one resolution on the way up.

A block with transformers has one after each resnet block, as deep as ``depths`` says; with no depths it has none. All
take the time embedding after its SiLU, (B or 1, D), an iterator over what the text is to the cross-attentions, of
which each takes the next, and the text's mask.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor, nn

from latentdiff.models.layers import Checkpointed, Downsample2D, ResnetBlock2D, Upsample2D
from latentdiff.models.text_context import TextInput
from latentdiff.models.transformer import SpatialTransformer

Transformers = Callable[..., SpatialTransformer]
Resnets = Callable[[int, int], ResnetBlock2D]


class Block(Checkpointed):
    """A block with transformers has them as ``attentions``; one without lacks the attribute: diffusers goes by that."""

    def add_transformers(self, depths: Sequence[int], transformer: Transformers) -> None:
        if depths:
            self.attentions = nn.ModuleList(transformer(depth=depth) for depth in depths)

    @property
    def transformers(self) -> Sequence[SpatialTransformer]:
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
        last: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(resnet(width, out_channels) for width in widths)
        self.add_transformers(depths, transformer)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(out_channels)])

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
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Resnet block, transformer, resnet block; without a transformer a single resnet block."""

    def __init__(self, channels: int, *, depths: Sequence[int], resnet: Resnets, transformer: Transformers) -> None:
        super().__init__()
        self.add_transformers(depths, transformer)
        self.resnets = nn.ModuleList(resnet(channels, channels) for _ in range(1 + len(depths)))

    def forward(self, x: Tensor, time: Tensor, text: Iterator[TextInput], mask: Tensor | None) -> Tensor:
        x = self.run(self.resnets[0], x, time)
        if self.transformers:
            x = self.transformers[0](x, text, mask)
            x = self.run(self.resnets[1], x, time)
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
        last: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            resnet(width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.add_transformers(depths, transformer)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(out_channels)])
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
            x = upsample(x, size)
        return x


def reweighed(x: Tensor, skip: Tensor, skip_scale: float, backbone_scale: float) -> tuple[Tensor, Tensor]:
    """FreeU (Si et al. 2023), Eqs. 4 to 6: half of the backbone's channels up, the low frequencies of the skip down."""
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half] * backbone_scale, x[:, half:]], dim=1)
    return x, fourier_filter(skip, threshold=1, scale=skip_scale)
