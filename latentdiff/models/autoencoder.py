"""The autoencoders: ``AutoencoderKL`` and ``VQModel``, with diffusers' names, config keys and weights, and two more
with codes, ``GumbelVQModel`` and ``FSQModel``.

Latent Diffusion (Rombach et al. 2022), Sec. 3.1. All are an encoder, a bottleneck and a decoder, and all offer a
trainer the same way through::

    output = model(pixels, sample_posterior=True, generator=generator)
    output.sample                 # (B, C, H, W), the reconstruction
    output.bottleneck.losses      # {"kl": ...} or {"commitment": ..., "codebook": ...}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latentdiff.models.bottlenecks import (
    BottleneckOutput,
    DiagonalGaussianDistribution,
    FiniteScalarQuantizer,
    GaussianBottleneck,
    Generators,
    GumbelQuantizer,
    VectorQuantizer,
)
from latentdiff.models.coders import DOWN_BLOCKS, UP_BLOCKS, Decoder, Encoder
from latentdiff.models.config import check_choice, check_multiple, per_level
from latentdiff.models.logit_laplace import LogitLaplace
from latentdiff.models.network import Network
from latentdiff.models.single_file import SingleFileModel
from latentdiff.models.tiling import check_tiles, in_tiles, one_by_one


@dataclass
class AutoencoderOutput(DecoderOutput):
    """What an autoencoder's ``forward`` returns.

    ``sample``, ``commit_loss`` (of codes only), ``bottleneck``, of codes ``encoded``, what was quantized, and
    ``raw``, what the decoder gave.
    """

    bottleneck: BottleneckOutput | None = None
    encoded: Tensor | None = None
    raw: Tensor | None = None


class Autoencoder(SingleFileModel, Network):
    """What both autoencoders share: pixels to what the bottleneck takes, latents to pixels, one image at a time or not.

    Subclasses set ``encoder``, ``decoder``, ``quant_conv``, ``post_quant_conv`` and ``bottleneck``.
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
            ValueError: there are no such tiles. Attributes are looked at when they are used.
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
        """Tiles with sides of so many pixels, rounded down to whole latents."""
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        self.tile_latent_min_size = pixels // factor
        self.tile_sample_min_size = self.tile_latent_min_size * factor or pixels

    def tiles(self) -> tuple[int, int, float]:
        """A tile's side in pixels and in latents, and the share that the next one covers too; `check_tiles` raises."""
        tiles = self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor
        check_tiles(*tiles, factor=2 ** (len(self.config.block_out_channels) - 1))
        return tiles

    def disable_tiling(self) -> None:
        self.use_tiling = False


class AutoencoderKL(Autoencoder):
    """Autoencoder with a Gaussian posterior over continuous latents.

    The config is diffusers' ``AutoencoderKL``'s. ``scaling_factor``, ``shift_factor``, ``latents_mean`` and
    ``latents_std`` are kept for whoever scales latents; no method here scales.

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


class CodeAutoencoder(Autoencoder):
    """What the autoencoders with codes share. Subclasses set ``quant_conv``, ``quantize`` and ``post_quant_conv``.

    A picture's codes are whole numbers: `encode_to_indices` gives them, `decode_from_indices` draws them.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"norm_type": ("group",)}
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["quantize"]

    @property
    def bottleneck(self) -> Any:
        return self.quantize

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """(B, C, H, W), values in [-1, 1] -> ``.latents`` (B, C, h, w), not yet quantized."""
        latents = self.encode_moments(x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def encode_to_indices(self, x: Tensor) -> Tensor:
        """(B, C, H, W), values in [-1, 1] -> the codes' indices, (B, h, w) int64 from 0 to the number of codes - 1."""
        return self.quantize.nearest(self.encode_moments(x))

    @apply_forward_hook
    def decode_from_indices(self, indices: Tensor) -> Tensor:
        """The codes' indices, (B, h, w) of whole numbers -> (B, C, H, W), about [-1, 1].

        Raises:
            ValueError: they are not whole numbers of that shape, or there is no such code.
        """
        if indices.ndim != 3 or indices.is_floating_point():
            raise ValueError(
                f"indices must be whole numbers of shape (B, h, w), not {indices.dtype} of {tuple(indices.shape)}"
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codes:
            raise ValueError(
                f"indices must lie from 0 to {self.codes - 1}, not from {int(indices.min())} to {int(indices.max())}"
            )
        return self.decode_latents(self.quantize.lookup(indices.long()).to(self.dtype))

    @property
    def codes(self) -> int:
        """How many codes there are."""
        raise NotImplementedError

    @apply_forward_hook
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: Sequence[int] | None = None,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Unscaled latents (B, C, h, w) -> ``.sample`` (B, C, H, W), about [-1, 1], and ``.commit_loss``.

        They are quantized first, or not with ``force_not_quantize``. If so, and if the config says
        ``lookup_from_codebook``, ``h`` holds the codes' indices and ``shape`` is (B, h, w, C). ``generator`` is there
        because diffusers' pipelines pass one; nothing is random.
        """
        if not force_not_quantize:
            bottleneck = self.quantize(h, sample=False)
            latents, loss = bottleneck.latents, commit_loss(bottleneck)
        elif self.config.get("lookup_from_codebook"):
            if shape is None:
                raise ValueError(f"{type(self).__name__}.decode: indices need shape=(batch, height, width, channels).")
            latents = self.quantize.lookup(h.reshape(tuple(shape)[:3]))
            loss = latents.new_zeros(len(latents))
        else:
            latents, loss = h, h.new_zeros(len(h))
        sample = self.decode_latents(latents)
        return DecoderOutput(sample=sample, commit_loss=loss) if return_dict else (sample, loss)

    def forward(
        self,
        sample: Tensor,
        return_dict: bool = True,
        sample_posterior: bool = False,
        generator: Generators = None,
    ) -> AutoencoderOutput | tuple[Tensor, Tensor]:
        """(B, C, H, W) to codes and back: ``.sample``, ``.commit_loss``, and ``.bottleneck``.

        ``sample_posterior`` and ``generator`` matter where codes are drawn (`GumbelVQModel` in training).
        """
        h = self.encode_moments(sample)
        bottleneck = self.quantize(h, sample_posterior, generator)
        raw, loss = self.decode_raw(bottleneck.latents), commit_loss(bottleneck)
        reconstruction = self.pixels_of(raw)
        return AutoencoderOutput(reconstruction, loss, bottleneck, h, raw) if return_dict else (reconstruction, loss)


class VQModel(CodeAutoencoder):
    """Autoencoder with a codebook: every latent vector is replaced by the nearest of ``num_vq_embeddings``.

    The config is diffusers' ``VQModel``'s. ``decode`` takes, besides what diffusers' takes, the ``generator`` that the
    Stable Diffusion pipelines pass.

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
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        per_level("VQModel", "num_vq_embeddings", num_vq_embeddings, 1)
        self.build_coders(encoder_channels=latent_channels)
        code_dim = vq_embed_dim or latent_channels
        self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, code_dim)
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)

    @property
    def codes(self) -> int:
        return self.config.num_vq_embeddings


class GumbelVQModel(CodeAutoencoder):
    """Autoencoder whose encoder gives a distribution over codes, as DALL-E's discrete VAE (Ramesh et al. 2021).

    The config is `VQModel`'s, and ``logit_laplace``: the decoder gives a distribution of every value, as DALL-E's does,
    ``sample`` is its middle, and there is a likelihood to train by. diffusers has no such class. In training,
    ``forward(..., sample_posterior=True)`` draws relaxed codes at ``quantize.temperature``; everywhere else the
    likeliest code is taken.

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
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        mid_block_add_attention: bool = True,
        logit_laplace: bool = False,
        force_upcast: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        per_level("GumbelVQModel", "num_vq_embeddings", num_vq_embeddings, 1)
        self.build_coders(latent_channels, decoder_channels=2 * out_channels if logit_laplace else None)
        code_dim = vq_embed_dim or latent_channels
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.quantize = GumbelQuantizer(latent_channels, num_vq_embeddings, code_dim)
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)

    @property
    def codes(self) -> int:
        return self.config.num_vq_embeddings

    def pixels_of(self, raw: Tensor) -> Tensor:
        return LogitLaplace(raw).pixels.to(raw.dtype) if self.config.logit_laplace else raw


class FSQModel(CodeAutoencoder):
    """Autoencoder whose latents are rounded to a few ``levels`` in each of their channels (Mentzer et al. 2023).

    The config is `VQModel`'s, with ``levels`` in place of the codebook; diffusers has no such class.

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
        sample_size: int = 32,
        levels: Sequence[int] = (8, 5, 5, 5),
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        mid_block_add_attention: bool = True,
        force_upcast: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        self.accept_neutral(others)
        per_level("FSQModel", "levels", levels, len(levels), least=2)
        self.build_coders(encoder_channels=latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, len(levels), 1)
        self.quantize = FiniteScalarQuantizer(levels)
        self.post_quant_conv = nn.Conv2d(len(levels), latent_channels, 1)

    @property
    def codes(self) -> int:
        return self.quantize.codes


def commit_loss(bottleneck: BottleneckOutput) -> Tensor:
    """diffusers' name for the sum of a bottleneck's losses."""
    losses = list(bottleneck.losses.values())
    return torch.stack(losses).sum() if losses else bottleneck.latents.new_zeros(())


def check_autoencoder(name: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError with key and value for what neither autoencoder can be."""
    levels = len(config["block_out_channels"])
    for key in ("in_channels", "out_channels", "latent_channels"):
        per_level(name, key, config[key], 1)
    channels = per_level(name, "block_out_channels", config["block_out_channels"], levels)
    check_choice(name, "act_fn", config["act_fn"], ("silu", "swish"))
    check_choice(name, "down_block_types", config["down_block_types"], DOWN_BLOCKS)
    check_choice(name, "up_block_types", config["up_block_types"], UP_BLOCKS)
    for key in ("down_block_types", "up_block_types"):
        if len(config[key]) != levels:
            raise ValueError(f"{name}: {key}={config[key]!r} has {len(config[key])} entries for {levels} levels.")
    per_level(name, "layers_per_block", config["layers_per_block"], 1)
    groups = per_level(name, "norm_num_groups", config["norm_num_groups"], 1) * levels
    check_multiple(name, "block_out_channels", channels, "norm_num_groups", groups)
