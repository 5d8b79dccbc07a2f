"""The config of the autoencoder in a checkpoint, inferred from the shapes of its weights; GroupNorm has 32 groups."""

import re

from latentdiff.interchange.single_file.configs import Config, numbers
from latentdiff.interchange.single_file.files import Checkpoint
from latentdiff.interchange.single_file.names import CODEBOOK, GUMBEL_CODEBOOK, VAE


def vae_config(weights: Checkpoint) -> Config:
    """diffusers' config of the autoencoder in a checkpoint, without its ``scaling_factor`` and ``sample_size``.

    Raises:
        ValueError: it is not one of Latent Diffusion's.
    """
    try:
        in_channels = weights.shape(f"{VAE}encoder.conv_in.weight")[1]
        levels = numbers(weights, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
        channels = [weights.shape(f"{VAE}encoder.down.{i}.block.0.conv2.weight")[0] for i in levels]
        layers = numbers(weights, re.escape(VAE) + r"encoder\.down\.0\.block\.(\d+)\.")
        latent_channels = weights.shape(f"{VAE}decoder.conv_in.weight")[1]
        out_channels = weights.shape(f"{VAE}decoder.conv_out.weight")[0]
    except (KeyError, IndexError) as error:
        raise not_of_latent_diffusion(weights, error) from None
    attends = [f"{VAE}encoder.down.{i}.attn.0.q.weight" in weights for i in levels]
    config: Config = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "latent_channels": latent_channels,
        "block_out_channels": channels,
        "layers_per_block": len(layers),
        "down_block_types": ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in attends[::-1]],
        "mid_block_add_attention": f"{VAE}encoder.mid.attn_1.q.weight" in weights,
    }
    codebook = {"VQModel": CODEBOOK, "GumbelVQModel": GUMBEL_CODEBOOK}.get(autoencoder_kind(weights))
    return config | (gaussian_config(weights, latent_channels) if codebook is None else codes(weights, codebook))


def autoencoder_kind(weights: Checkpoint) -> str:
    """The class of the autoencoder in a checkpoint: "AutoencoderKL", "VQModel" or "GumbelVQModel".

    Raises:
        ValueError: it is not one of Latent Diffusion's, or has no codebook where there should be one.
    """
    if GUMBEL_CODEBOOK in weights or f"{VAE}quantize.proj.weight" in weights:
        return "GumbelVQModel"
    if CODEBOOK in weights:
        return "VQModel"
    try:
        gives = weights.shape(f"{VAE}encoder.conv_out.weight")[0]
        takes = weights.shape(f"{VAE}decoder.conv_in.weight")[1]
    except (KeyError, IndexError) as error:
        raise not_of_latent_diffusion(weights, error) from None
    if gives == takes:  # the encoder of a Gaussian has twice as many, for mean and width
        raise ValueError(
            f"{weights.file}: {weights.own_name(CODEBOOK)} is missing; the encoder gives {gives} channels and the "
            f"decoder takes as many, as where there is a codebook"
        )
    return "AutoencoderKL"


def gaussian_config(weights: Checkpoint, latent_channels: int) -> Config:
    """The part of `vae_config` that concerns a Gaussian."""
    after = f"{VAE}post_quant_conv.weight"
    channels = weights.shape(after)[1:2] if after in weights else ()
    if channels not in ((), (latent_channels,)):
        raise ValueError(
            f"{weights.file}: its latents have {channels[0]} channels and its decoder is made for {latent_channels} "
            f"(embed_dim and z_channels in the original); diffusers' AutoencoderKL has one number for both"
        )
    return {"use_quant_conv": f"{VAE}quant_conv.weight" in weights, "use_post_quant_conv": after in weights}


def codes(weights: Checkpoint, codebook: str) -> Config:
    """The part of `vae_config` that concerns a codebook."""
    if codebook not in weights:
        raise ValueError(f"{weights.file}: {weights.own_name(codebook)} is missing, the codebook")
    shape = weights.shape(codebook)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{weights.file}: the codebook {weights.own_name(codebook)} should be of codes and dimensions, one at "
            f"least of each, and has the shape {list(shape)}"
        )
    return {"num_vq_embeddings": shape[0], "vq_embed_dim": shape[1]}


def not_of_latent_diffusion(weights: Checkpoint, error: KeyError | IndexError) -> ValueError:
    what = f"{weights.file}: the autoencoder is not one of Latent Diffusion's"
    if isinstance(error, IndexError):
        return ValueError(f"{what}; weights of its convolutions lack dimensions")
    return ValueError(f"{what}; no '{weights.own_name(str(error.args[0]))}'")
