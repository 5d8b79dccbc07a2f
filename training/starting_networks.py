"""The networks that training starts from: new ones of the size that settings describe, or those of a folder."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from latentdiff.codec import Codec
from latentdiff.diffusion.process import Process
from latentdiff.interchange.folders import packaged_models, read_json
from latentdiff.models import (
    AutoencoderKL,
    AutoencoderTiny,
    DalleAutoencoder,
    DiTTransformer2DModel,
    FSQModel,
    GumbelVQModel,
    IdentityAutoencoder,
    NoisyClassifier,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from latentdiff.pipelines.storage.loading import OUR_CLASSES, OURS_ALONE
from latentdiff.pipelines.storage.places import autoencoder_in, local_place
from latentdiff.text.encode import TextConditioner
from latentdiff.text.masked import MaskedTextConditioner
from latentdiff.training.settings import AutoencoderSettings, ClassifierSettings, DenoiserSettings

Autoencoder = (
    AutoencoderKL | VQModel | GumbelVQModel | FSQModel | DalleAutoencoder | AutoencoderTiny | IdentityAutoencoder
)
AUTOENCODERS = OUR_CLASSES["vae"] + OURS_ALONE["vae"]


def build_autoencoder(settings: AutoencoderSettings) -> Any:
    """A new autoencoder of the kind and size that the settings describe."""
    if settings.kind == "tiny":
        return build_tiny(settings)
    attends = settings.attention_levels or (False,) * len(settings.block_out_channels)
    shape: dict[str, Any] = {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        "block_out_channels": settings.block_out_channels,
        "layers_per_block": settings.layers_per_block,
        "latent_channels": settings.latent_channels,
        "norm_num_groups": settings.norm_num_groups,
        "sample_size": settings.resolution,
    }
    codes = {"num_vq_embeddings": settings.num_vq_embeddings}
    match settings.kind:
        case "vq":
            return VQModel(**shape, **codes)
        case "gumbel":
            return GumbelVQModel(**shape, **codes, logit_laplace=settings.logit_laplace_weight > 0)
        case "fsq":
            return FSQModel(**shape, levels=settings.fsq_levels)
    return AutoencoderKL(**shape)


def build_tiny(settings: AutoencoderSettings) -> AutoencoderTiny:
    """As TAESD is built: of blocks, one at the size of the pictures and `layers_per_block` at every smaller one."""
    channels, blocks = settings.block_out_channels, settings.layers_per_block
    smaller = (blocks,) * (len(channels) - 1)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        latent_channels=settings.latent_channels,
        num_encoder_blocks=(1, *smaller),
        num_decoder_blocks=(*smaller, 1),
    )


@dataclass(frozen=True)
class Conditions:
    """What a denoiser is conditioned on.

    Args:
        text_width: D, of text states (B, L, D); None: no text.
        classes: how many there are, besides none of them, which is the label after the last; 0: no classes.
    """

    text_width: int | None = None
    classes: int = 0


_DENOISERS: dict[str, Callable[..., Any]] = {}


def register_denoiser(name: str, build: Callable[..., Any]) -> None:
    """Make a kind of denoiser known to ``train denoiser``, as ``denoiser=name``.

    Args:
        build: called with ``settings`` (`DenoiserSettings`), ``codec``, ``process``, ``conditions`` (`Conditions`) and
            the ``denoiser_options`` of the settings, all by name; returns a new network, which takes
            ``codec.channels`` channels and gives ``process.prediction_channels(codec.channels)``. See
            `latentdiff.models.network.Denoiser` for what it must be.
    """
    _DENOISERS[name] = build


def build_denoiser(settings: DenoiserSettings, codec: Codec, process: Process, conditions: Conditions) -> Any:
    """The new denoiser that the settings describe.

    Raises:
        ValueError: there is no such denoiser, or it does not take these options.
    """
    given = {"settings": settings, "codec": codec, "process": process, "conditions": conditions}
    return made_by(_DENOISERS, "denoiser", settings.denoiser, **given, **settings.denoiser_options)


def made_by(makers: Mapping[str, Callable[..., Any]], key: str, name: str, **options: Any) -> Any:
    """What the maker of that name makes with these options.

    Raises:
        ValueError: there is no such maker, or it does not take these options; the message names `key`.
    """
    if name not in makers:
        raise ValueError(
            f"there is no {key} {name!r}; there are {', '.join(makers)}, and those of modules given by --extension"
        )
    try:
        inspect.signature(makers[name]).bind(**options)
    except TypeError as error:
        raise ValueError(f"{key}_options of {key}={name}: {error}") from error
    return makers[name](**options)


def build_unet(
    settings: DenoiserSettings, codec: Codec, process: Process, conditions: Conditions
) -> UNet2DConditionModel | UNet2DModel:
    """A new UNet for the codec's latents: with cross-attention if there is text, else without.

    With classes it has one embedding more than there are, for none of them.
    """
    with_text, kind = conditions.text_width is not None, settings.resample_type
    plain = "DownBlock2D" if kind == "conv" else "ResnetDownsampleBlock2D"
    attending = "CrossAttnDownBlock2D" if with_text else "AttnDownBlock2D"
    down = [attending if attends else plain for attends in settings.attention_levels]
    shape: dict[str, Any] = {
        "sample_size": settings.resolution // codec.factor,
        "in_channels": codec.channels,
        "out_channels": process.prediction_channels(codec.channels),
        "down_block_types": tuple(down),
        "up_block_types": tuple(block.replace("Down", "Up") for block in reversed(down)),
        "block_out_channels": settings.block_out_channels,
        "layers_per_block": settings.layers_per_block,
        "norm_num_groups": settings.norm_num_groups,
        "resnet_time_scale_shift": settings.resnet_time_scale_shift,
    }
    if with_text:
        heads = [max(1, width // settings.attention_head_dim) for width in settings.block_out_channels]
        return UNet2DConditionModel(
            **shape,
            transformer_layers_per_block=settings.transformer_layers_per_block,
            attention_head_dim=tuple(heads),  # diffusers' name for the number of heads
            cross_attention_dim=conditions.text_width,
            use_linear_projection=True,
        )
    return UNet2DModel(
        **shape,
        attention_head_dim=settings.attention_head_dim,
        downsample_type=kind,
        upsample_type=kind,
        num_class_embeds=conditions.classes + 1 if conditions.classes else None,
    )


register_denoiser("unet", build_unet)


def build_dit(
    settings: DenoiserSettings,
    codec: Codec,
    process: Process,
    conditions: Conditions,
    depth: int = 12,
    width: int = 384,
    heads: int | None = None,
    patch_size: int = 2,
) -> DiTTransformer2DModel | PixArtTransformer2DModel:
    """A new transformer for the codec's latents: PixArt's if there is text, else DiT's; by default of the size DiT-S.

    A DiT has the embeddings of 1000 classes at least, for diffusers' ``DiTPipeline`` guides by label 1000.

    Args:
        heads: of every attention; by default of 64 numbers each, as far as that divides the width.

    Raises:
        ValueError: the resolution or the heads do not fit.
    """
    side, head = settings.resolution // codec.factor, math.gcd(64, width) if heads is None else width // heads
    if side % patch_size or (heads is not None and width % heads):
        what = f"heads={heads} do not divide width={width}"
        if side % patch_size:
            what = f"resolution {settings.resolution} makes latents of {side}x{side}, no multiple of {patch_size=}"
        raise ValueError(f"denoiser_options of denoiser=dit: {what}")
    shape: dict[str, Any] = {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": depth,
        "sample_size": side,
        "patch_size": patch_size,
        "in_channels": codec.channels,
        "out_channels": process.prediction_channels(codec.channels),
        "norm_eps": 1e-6,
    }
    network: DiTTransformer2DModel | PixArtTransformer2DModel
    if conditions.text_width is None:
        network = DiTTransformer2DModel(**shape, num_embeds_ada_norm=max(1000, conditions.classes))
    else:
        text = {"cross_attention_dim": width, "caption_channels": conditions.text_width}
        network = PixArtTransformer2DModel(**shape, **text, use_additional_conditions=False)
    network.start_from_nothing()
    return network


register_denoiser("dit", build_dit)


def text_manner(denoiser: str) -> type[TextConditioner]:
    """How a new denoiser of that name is given captions."""
    return MaskedTextConditioner if denoiser == "dit" else TextConditioner


def build_classifier(settings: ClassifierSettings, codec: Codec, classes: int) -> NoisyClassifier:
    """A new classifier of noisy latents of the codec."""
    down = ["AttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" for attends in settings.attention_levels]
    return NoisyClassifier(
        sample_size=settings.resolution // codec.factor,
        in_channels=codec.channels,
        num_classes=classes,
        down_block_types=tuple(down),
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        attention_head_dim=settings.attention_head_dim,
        norm_num_groups=settings.norm_num_groups,
        attn_norm_num_groups=settings.norm_num_groups,
        dropout=settings.dropout,
        pool=settings.pool,
    )


def load_autoencoder(folder: str) -> Autoencoder:
    """The autoencoder in `folder`, or in the ``vae`` or ``vqvae`` folder of a pipeline there, which may be a packaged
    model's name; that of a single file; one that changes nothing for "pixels".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a model of another class, or its latents are not what its config says of them.
    """
    from latentdiff import models

    if folder == "pixels":
        return IdentityAutoencoder()
    place = packaged_models().get(folder, Path(folder).expanduser())
    if place.is_file():
        autoencoder = autoencoder_in(cast(Path, local_place(folder)))
        check_latents(place, autoencoder.config)
        return cast(Autoencoder, autoencoder)
    for candidate in (place, place / "vae", place / "vqvae"):
        if (candidate / "config.json").is_file():
            kind = read_json(candidate / "config.json").get("_class_name")
            if kind not in AUTOENCODERS:
                raise ValueError(f"{candidate}: its config.json is of a {kind}, not of {' or '.join(AUTOENCODERS)}")
            autoencoder = getattr(models, kind).from_pretrained(candidate)
            check_latents(candidate, autoencoder.config)
            return cast(Autoencoder, autoencoder)
    raise FileNotFoundError(
        f"{folder}: no autoencoder found (no config.json there or in its vae/); train one with "
        f"'latentdiff train autoencoder --output {folder}'"
    )


def check_latents(folder: Path, config: Any) -> None:
    """Raises ValueError if codes have another number of channels than ``latent_channels``, which pipelines rely on."""
    channels = len(config["levels"]) if "levels" in config else config.get("vq_embed_dim") or config["latent_channels"]
    if channels != config["latent_channels"]:
        key = "levels" if "levels" in config else "vq_embed_dim"
        raise ValueError(
            f"{folder}: its latents have {channels} channels ({key}) and latent_channels={config['latent_channels']}; "
            f"pipelines draw with autoencoders where both are the same"
        )


def freeze(*networks: nn.Module) -> None:
    """Networks that are not trained: no gradients, evaluation mode."""
    for network in networks:
        network.requires_grad_(False).eval()


def without_dropout(network: nn.Module) -> None:
    """Take the dropout out, as in drawing: a little training of a finished network needs none. The config keeps it."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
