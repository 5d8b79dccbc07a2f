"""What all autoencoders share, and ``AutoencoderKL``, with diffusers' name, config keys and weights.

Latent Diffusion (Rombach et al. 2022), Sec. 3.1. All are an encoder, a bottleneck and a decoder, and all offer a
trainer the same way through::

    output = model(pixels, sample_posterior=True, generator=generator)
    output.sample                 # (B, C, H, W), the reconstruction
    output.bottleneck.losses      # {"kl": ...} or {"commitment": ..., "codebook": ...}
"""

from collections.abc import Mapping, Sequence
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
from latentdiff.models.coders import DOWN_BLOCKS, UP_BLOCKS, Decoder, Encoder
from latentdiff.models.config import check_block_types, check_choice, check_multiple, per_level
from latentdiff.models.network import Network
from latentdiff.models.single_file import SingleFileModel
from latentdiff.models.tiling import check_tiles, in_tiles, one_by_one


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
        config = self.config
        check_autoencoder(type(self).__name__, config)
        shared: dict[str, Any] = {
            "channels": config.block_out_channels,
            "layers": config.layers_per_block,
            "groups": config.norm_num_groups,
            "mid_attention": config.mid_block_add_attention,
        }
        self.encoder = Encoder(config.in_channels, encoder_channels, block_types=config.down_block_types, **shared)
        decoder_channels = decoder_channels or config.out_channels
        self.decoder = Decoder(config.latent_channels, decoder_channels, block_types=config.up_block_types, **shared)
        self.use_slicing = self.use_tiling = False
        self.set_tiles(config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0])
        self.tile_overlap_factor, self.tile_shared_norms = 0.25, False

    def encode_moments(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W), values in [-1, 1] -> (B, C', h, w), what ``bottleneck`` takes."""
        if self.use_slicing and len(pixels) > 1:
            return one_by_one(self.encode_moments, pixels)
        if self.use_tiling:
            tile, latent_tile, overlap = self.tiles()
            if max(pixels.shape[-2:]) > tile:
                return in_tiles(self._moments, pixels, tile, latent_tile, overlap, shared_norms=self.tile_shared_norms)
        return self._moments(pixels)

    def _moments(self, pixels: Tensor) -> Tensor:
        h = self.encoder(pixels)
        return h if self.quant_conv is None else self.quant_conv(h)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, C, h, w), what ``bottleneck`` gives -> (B, C, H, W), values about [-1, 1]."""
        return self.pixels_of(self.decode_raw(latents))

    def pixels_of(self, raw: Tensor) -> Tensor:
        """What the decoder gives -> (B, C, H, W), values about [-1, 1]."""
        return raw

    def decode_raw(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', H, W), what the decoder gives."""
        if self.use_slicing and len(latents) > 1:
            return one_by_one(self.decode_raw, latents)
        if self.use_tiling:
            tile, latent_tile, overlap = self.tiles()
            if max(latents.shape[-2:]) > latent_tile:
                return in_tiles(self._pixels, latents, latent_tile, tile, overlap, shared_norms=self.tile_shared_norms)
        return self._pixels(latents)

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))

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
        """A tile's side in pixels and in latents, and the share that the next one covers too; `check_tiles` raises."""
        tiles = self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor
        check_tiles(*tiles, factor=self.downscale_factor)
        return tiles

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


def check_autoencoder(name: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError with key and value for what no autoencoder supports."""
    levels = len(config["block_out_channels"])
    for key in ("in_channels", "out_channels", "latent_channels"):
        per_level(name, key, config[key], 1)
    channels = per_level(name, "block_out_channels", config["block_out_channels"], levels)
    check_choice(name, "act_fn", config["act_fn"], ("silu", "swish"))
    check_block_types(name, "down_block_types", config["down_block_types"], DOWN_BLOCKS, levels)
    check_block_types(name, "up_block_types", config["up_block_types"], UP_BLOCKS, levels)
    per_level(name, "layers_per_block", config["layers_per_block"], 1)
    groups = per_level(name, "norm_num_groups", config["norm_num_groups"], 1) * levels
    check_multiple(name, "block_out_channels", channels, "norm_num_groups", groups)


def __getattr__(name: str) -> Any:
    """The classes of `codes` that pipelines saved before they moved there look for here."""
    if name in ("GumbelVQModel", "FSQModel"):
        from latentdiff.models import codes

        return getattr(codes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
