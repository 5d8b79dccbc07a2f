"""Encoder and decoder of all autoencoders: pixels to a small grid of features and back.

Taming Transformers (Esser et al. 2021), Appendix; Latent Diffusion (Rombach et al. 2022), Appendix G.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from latentdiff.models.layers import (
    Checkpointed,
    Downsample2D,
    GridAttention,
    ResnetBlock2D,
    Upsample2D,
    norm_silu,
)

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


class CoderBlock(nn.Module):
    """The resnet blocks of one resolution, all followed by attention or none."""

    def __init__(self, in_channels: int, out_channels: int, *, layers: int, attention: bool, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, groups=groups) for width in widths[:-1])
        self.attentions = nn.ModuleList(
            GridAttention(out_channels, groups=groups) for _ in range(layers if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x)
        return x


class DownBlock(CoderBlock):
    """Resnet blocks, then half the size, except on the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, attention: bool, groups: int, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, layers=layers, attention=attention, groups=groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(out_channels, padding=0)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpBlock(CoderBlock):
    """Resnet blocks, then twice the size, except on the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, *, layers: int, attention: bool, groups: int, last: bool
    ) -> None:
        super().__init__(in_channels, out_channels, layers=layers, attention=attention, groups=groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MidBlock(nn.Module):
    """Resnet block, attention, resnet block at the lowest resolution."""

    def __init__(self, channels: int, *, attention: bool, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([GridAttention(channels, groups=groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups=groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(Checkpointed):
    """(B, in_channels, H, W) -> (B, out_channels, h, w) with h = H / 2^(levels - 1), rounded down at every level.

    Raises:
        ValueError: pictures with other channels, or too small for one latent.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block_types: Sequence[str],
        channels: Sequence[int],
        layers: int,
        groups: int,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        last = len(channels) - 1
        self.in_channels, self.factor = in_channels, 2 ** (len(channels) - 1)
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, layers=layers, attention="Attn" in kind, groups=groups, last=i == last)
            for i, (kind, before, after) in enumerate(
                zip(block_types, [channels[0], *channels], channels, strict=False)
            )
        )
        self.mid_block = MidBlock(channels[-1], attention=mid_attention, groups=groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        self.check(pixels)
        x = self.conv_in(pixels)
        for block in self.down_blocks:
            x = self.run(block, x)
        x = self.run(self.mid_block, x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))

    def check(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != self.in_channels:
            raise ValueError(
                f"pictures must be (B, {self.in_channels}, H, W), of {self.in_channels} channels; these are "
                f"{tuple(pixels.shape)}"
            )
        height, width = pixels.shape[-2:]
        if min(height, width) < self.factor:
            raise ValueError(
                f"{width}x{height} pixels are too few for an autoencoder with a factor of {self.factor}; it takes at "
                f"least {self.factor} on each side"
            )


class Decoder(Checkpointed):
    """(B, in_channels, h, w) -> (B, out_channels, H, W) with H = h * 2^(levels - 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block_types: Sequence[str],
        channels: Sequence[int],
        layers: int,
        groups: int,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        last, channels = len(channels) - 1, channels[::-1]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], attention=mid_attention, groups=groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, layers=layers + 1, attention="Attn" in kind, groups=groups, last=i == last)
            for i, (kind, before, after) in enumerate(
                zip(block_types, [channels[0], *channels], channels, strict=False)
            )
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        x = self.run(self.mid_block, x)
        for block in self.up_blocks:
            x = self.run(block, x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))
