"""What all autoencoders share, and ``AutoencoderKL``, with diffusers' name, config keys and weights.

Latent Diffusion (Rombach et al. 2022), Sec. 3.1 and Appendix G; Taming Transformers (Esser et al. 2021), Appendix. All
are an encoder, a bottleneck and a decoder, and all offer a trainer the same way through::

    output = model(pixels, sample_posterior=True, generator=generator)
    output.sample                 # (B, C, H, W), the reconstruction
    output.bottleneck.losses      # {"kl": ...} or {"commitment": ..., "codebook": ...}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import ModelMixin  # noqa: F401  diffusers' loader of pipelines looks for it beside the class
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.models.bottlenecks import (
    BottleneckOutput,
    DiagonalGaussianDistribution,
    GaussianBottleneck,
    Generators,
)
from latentdiff.models.layers import Checkpointed, Downsample2D, GridAttention, ResnetBlock2D, Upsample2D, norm_silu
from latentdiff.models.network import Network, downscale_factor
from latentdiff.models.single_file_networks import SingleFileModel
from latentdiff.models.tiling import Run, in_tiles, one_by_one

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


class Level(nn.Module):
    """The resnet blocks of one resolution, all followed by attention or none, and maybe a change of the resolution."""

    def __init__(self, in_channels: int, out_channels: int, *, layers: int, attention: bool, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, groups=groups) for width in widths)
        self.attentions = nn.ModuleList(
            GridAttention(out_channels, groups=groups) for _ in range(layers if attention else 0)
        )
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x)
        for downsample in self.downsamplers:
            x = downsample(x)
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

    Args:
        config: an autoencoder's.

    Raises:
        ValueError: pictures with other channels, or too small for one latent.
    """

    def __init__(self, config: Any, out_channels: int) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.in_channels, self.factor = config.in_channels, downscale_factor(config)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            before, attention = channels[max(i - 1, 0)], "Attn" in kind
            block = Level(before, channels[i], layers=config.layers_per_block, attention=attention, groups=groups)
            if i < len(channels) - 1:
                block.downsamplers.append(Downsample2D(channels[i], padding=0))
            self.down_blocks.append(block)
        self.mid_block = MidBlock(channels[-1], attention=config.mid_block_add_attention, groups=groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self.in_channels, self.factor)
        x = self.conv_in(pixels)
        for block in self.down_blocks:
            x = self.run(block, x)
        x = self.run(self.mid_block, x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


def check_pixels(pixels: Tensor, channels: int, factor: int) -> None:
    """Raises ValueError unless pictures are (B, channels, H, W) with a side of `factor` at least."""
    if pixels.ndim != 4 or pixels.shape[1] != channels:
        raise ValueError(
            f"pictures must be (B, {channels}, H, W), of {channels} channels; these are {tuple(pixels.shape)}"
        )
    height, width = pixels.shape[-2:]
    if min(height, width) < factor:
        raise ValueError(
            f"{width}x{height} pixels are too few for an autoencoder with a factor of {factor}; it takes at least "
            f"{factor} on each side"
        )


class Decoder(Checkpointed):
    """(B, latent_channels, h, w) -> (B, out_channels, H, W) with H = h * 2^(levels - 1).

    Args:
        config: an autoencoder's.
    """

    def __init__(self, config: Any, out_channels: int) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], attention=config.mid_block_add_attention, groups=groups)
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            before, attention = channels[max(i - 1, 0)], "Attn" in kind
            block = Level(before, channels[i], layers=config.layers_per_block + 1, attention=attention, groups=groups)
            if i < len(channels) - 1:
                block.upsamplers.append(Upsample2D(channels[i]))
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.run(self.mid_block, self.conv_in(latents))
        for block in self.up_blocks:
            x = self.run(block, x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


@dataclass
class AutoencoderOutput(DecoderOutput):
    """What an autoencoder's ``forward`` returns.

    ``sample`` and ``bottleneck``; with codes also ``commit_loss``, ``encoded``, the encoder's output before it was
    quantized, and ``raw``, the decoder's output before it became pixels.
    """

    bottleneck: BottleneckOutput | None = None
    encoded: Tensor | None = None
    raw: Tensor | None = None


class Autoencoder(SingleFileModel, Network):
    """Pixels to what the bottleneck takes, and latents to pixels: whole, one image at a time, or in tiles.

    Subclasses call `build_coders` and set ``quant_conv``, ``post_quant_conv`` and ``bottleneck``.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ResnetBlock2D", "GridAttention", "VectorQuantizer", "GumbelQuantizer"]
    _group_offload_block_modules: ClassVar[list[str]] = [
        "encoder",
        "decoder",
        "quant_conv",
        "post_quant_conv",
        "quantize",
    ]

    def build_coders(self, encoder_channels: int, decoder_channels: int | None = None) -> None:
        """Make encoder and decoder, of the channels that they give.

        Raises:
            ValueError: with key and value for what no autoencoder supports.
        """
        config, levels = self.config, len(self.config.block_out_channels)
        for key in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
            self.per_level(key)
        channels = self.per_level("block_out_channels", levels)
        self.check_choice("act_fn", ("silu", "swish"))
        self.check_choice("down_block_types", DOWN_BLOCKS, levels)
        self.check_choice("up_block_types", UP_BLOCKS, levels)
        self.check_multiple("block_out_channels", channels, config.norm_num_groups, "norm_num_groups")
        size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        encoder = Encoder(config, encoder_channels)  # first: a seed's weights depend on the order
        decoder = Decoder(config, decoder_channels or config.out_channels)
        self.set_coders(encoder, decoder, size)

    def set_coders(self, encoder: nn.Module, decoder: nn.Module, tile: int) -> None:
        """Take these as encoder and decoder, whole at first; tiles have this side in pixels."""
        self.encoder: Any = encoder
        self.decoder: Any = decoder
        self.use_slicing = self.use_tiling = False
        self.set_tiles(tile)
        self.tile_overlap_factor, self.tile_shared_norms = 0.25, False

    @property
    def last_weight(self) -> Tensor:
        """Of the layer that gives the pixels, by whose gradients losses are balanced."""
        weight: Tensor = self.decoder.conv_out.weight
        return weight

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W), values in [-1, 1] -> (B, C', h, w), what ``bottleneck`` takes."""
        return self._in_parts(self._moments, pixels, decoding=False)

    def _moments(self, pixels: Tensor) -> Tensor:
        h = self.encoder(pixels)
        return h if self.quant_conv is None else self.quant_conv(h)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, C, h, w), what ``bottleneck`` gives -> (B, C, H, W), values about [-1, 1]."""
        return self.pixels_of(self.decode_raw(latents))

    def decode_raw(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', H, W), what the decoder gives."""
        return self._in_parts(self._raw, latents, decoding=True)

    def _raw(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))

    def pixels_of(self, raw: Tensor) -> Tensor:
        """What the decoder gives -> (B, C, H, W), values about [-1, 1]."""
        return raw

    def _in_parts(self, run: Run, x: Tensor, decoding: bool) -> Tensor:
        """`run` of pictures or latents: of each by itself if sliced, in tiles if tiled and larger than one."""
        if self.use_slicing and len(x) > 1:
            return one_by_one(lambda one: self._in_parts(run, one, decoding), x)
        if not self.use_tiling:
            return run(x)
        pixels, latents, overlap = self.tiles()
        tile, out_tile = (latents, pixels) if decoding else (pixels, latents)
        if max(x.shape[-2:]) <= tile:
            return run(x)
        return in_tiles(run, x, tile, out_tile, overlap, shared_norms=self.tile_shared_norms)

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time, to save memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(
        self,
        use_tiling: bool = True,
        tile_sample_min_size: int | None = None,
        tile_overlap_factor: float | None = None,
        tile_shared_norms: bool | None = None,
    ) -> None:
        """Encode and decode pictures larger than a tile in tiles, each image of a batch in turn if sliced as well.

        Args:
            use_tiling: False: whole again.
            tile_sample_min_size: a tile's side in pixels, rounded down to whole latents; at first the config's
                ``sample_size``.
            tile_overlap_factor: from 0 to below 1, the share of a tile's side that the next one covers too; at first
                0.25.
            tile_shared_norms: normalise all tiles of a picture alike: nearer to the whole one, in twice the time; at
                first False.

        They stay as attributes of these names, beside ``tile_latent_min_size``, the side in latents, as in diffusers.

        Raises:
            ValueError: there are no such tiles. Attributes that are set directly are checked when they are used.
        """
        if tile_sample_min_size is not None:
            self.set_tiles(tile_sample_min_size)
        if tile_overlap_factor is not None:
            self.tile_overlap_factor = tile_overlap_factor
        if tile_shared_norms is not None:
            self.tile_shared_norms = tile_shared_norms
        self.use_tiling = use_tiling
        if use_tiling:
            self.tiles()

    def set_tiles(self, pixels: int) -> None:
        """Set the side of tiles in pixels, rounded down to whole latents."""
        self.tile_latent_min_size = pixels // self.downscale_factor
        self.tile_sample_min_size = self.tile_latent_min_size * self.downscale_factor or pixels

    def tiles(self) -> tuple[int, int, float]:
        """A tile's side in pixels and in latents, and the share that the next one covers too.

        Raises:
            ValueError: the attributes allow no tiles.
        """
        pixels, latents, overlap = self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor
        factor = self.downscale_factor
        if pixels < factor:
            raise ValueError(
                f"tile_sample_min_size={pixels} is too small: a tile needs one latent at least, {factor} pixels of "
                f"this model, and gives good pictures from about 32 latents on."
            )
        if pixels != latents * factor:
            raise ValueError(
                f"tile_sample_min_size={pixels} and tile_latent_min_size={latents} do not fit: this model has {factor} "
                f"pixels to a latent. Set them to {pixels // factor * factor} and {pixels // factor}, or call "
                f"enable_tiling(tile_sample_min_size={pixels})."
            )
        if not 0 <= overlap < 1:
            raise ValueError(f"tile_overlap_factor must be from 0 to below 1 (0.25 is usual), not {overlap!r}")
        return pixels, latents, overlap

    def disable_tiling(self) -> None:
        self.use_tiling = False


class AutoencoderKL(Autoencoder):
    """Autoencoder with a Gaussian posterior over continuous latents.

    The config is diffusers' ``AutoencoderKL``'s. ``scaling_factor``, ``shift_factor``, ``latents_mean`` and
    ``latents_std`` are kept for `latentdiff.codec`, which scales latents; no method here scales.

    Raises:
        ValueError: a key is unknown or asks for what is not supported.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        self.build_coders(encoder_channels=2 * latent_channels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.bottleneck = GaussianBottleneck()

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """(B, C, H, W), values in [-1, 1] -> the posterior over latents (B, C, h, w), as ``.latent_dist``."""
        posterior = DiagonalGaussianDistribution(self.encode_moments(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents (B, C, h, w) -> ``.sample`` (B, C, H, W), about [-1, 1].

        ``generator`` is there because diffusers' pipelines pass one; nothing is random.
        """
        sample = self.decode_latents(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> AutoencoderOutput | tuple[Tensor]:
        """(B, C, H, W) to latents and back: ``.sample``, and ``.bottleneck`` with the latents and the KL loss."""
        bottleneck = self.bottleneck(self.encode_moments(sample), sample_posterior, generator)
        reconstruction = self.decode_latents(bottleneck.latents)
        return AutoencoderOutput(reconstruction, bottleneck=bottleneck) if return_dict else (reconstruction,)


def __getattr__(name: str) -> Any:
    """The classes of `codes` that pipelines saved before they moved there look for here."""
    if name in ("GumbelVQModel", "FSQModel"):
        from latentdiff.models import codes

        return getattr(codes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
