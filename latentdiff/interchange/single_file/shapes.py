"""The configs of the networks in a checkpoint, inferred from the shapes of their weights.

What shapes do not determine is assumed to be as in Stable Diffusion: 8 attention heads where a transformer's
projections are convolutions (1.x, Latent Diffusion) and in the upscaler, one head for every 64 channels where they are
linear (2.x); 32 groups of normalisation.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from latentdiff.interchange.single_file.checkpoint import Checkpoint
from latentdiff.interchange.single_file.names import (
    ALONE,
    BERT,
    CLIP,
    CODEBOOK,
    FIRST,
    GUMBEL_CODEBOOK,
    OPEN_CLIP,
    SECOND,
    UNET,
    VAE,
)

Config = dict[str, Any]

SIZES_DIM = 256
"""Of each of the sizes that SDXL's UNet is told."""
ADDED = {
    "first of two": (SECOND, 6, f"SDXL's takes {6 * SIZES_DIM}, of six sizes"),
    "second alone": (ALONE, 5, f"SDXL's refiner takes {5 * SIZES_DIM}, of four sizes and a score"),
}
"""By the text encoders of SDXL's models: which makes the pooled embedding, and how many numbers come with it."""


def numbers(names: Iterable[str], beginning: str) -> list[int]:
    """The distinct numbers between `beginning` and a dot in `names`, in ascending order."""
    pattern = re.compile(re.escape(beginning) + r"(\d{1,9})\.")
    return sorted({int(match[1]) for name in names if (match := pattern.match(name))})


def simplified(values: list[Any]) -> Any:
    """One value if all are equal, else the list."""
    return values[0] if all(value == values[0] for value in values) else values


@dataclass
class UNetLevel:
    """One level of a UNet's way down."""

    channels: int = 0
    layers: int = 0
    depth: int = 0
    """Of its transformers, in blocks; 0 if it has none."""
    text_dim: int = 0
    is_linear: bool = False
    only_cross: bool = False


def unet_levels(weights: Checkpoint) -> list[UNetLevel]:
    levels = [UNetLevel()]
    for number in numbers(weights, f"{UNET}input_blocks.")[1:]:
        block = f"{UNET}input_blocks.{number}."
        if f"{block}0.op.weight" in weights:
            levels.append(UNetLevel())
            continue
        level = levels[-1]
        level.channels = weights.size(f"{block}0.in_layers.2.weight")
        level.layers += 1
        if f"{block}1.proj_in.weight" in weights:
            attention = f"{block}1.transformer_blocks.0.attn"
            level.depth = len(numbers(weights, f"{block}1.transformer_blocks."))
            level.text_dim = weights.size(f"{attention}2.to_k.weight", 1)
            level.is_linear = len(weights.shape(f"{block}1.proj_in.weight")) == 2
            level.only_cross = weights.size(f"{attention}1.to_k.weight", 1) != level.channels
    return levels


def unet_config(weights: Checkpoint) -> Config:
    """diffusers' config of the UNet in a checkpoint, without its ``sample_size``.

    Raises:
        ValueError: it is not one of Latent Diffusion's with cross-attention.
    """
    levels = unet_levels(weights)
    attending = [level for level in levels if level.text_dim]
    if not attending:
        raise ValueError(f"{weights.file}: the UNet has no cross-attention, so no text could tell it what to draw")
    is_linear, deepest = attending[-1].is_linear, len(numbers(weights, f"{UNET}middle_block.1.transformer_blocks."))
    channels = [level.channels for level in levels]
    starts = [sum(level.layers + 1 for level in levels[::-1][:i]) for i in range(len(levels))]
    up = [f"{UNET}output_blocks.{start}.1.proj_in.weight" in weights for start in starts]
    config: Config = {
        "in_channels": weights.size(f"{UNET}input_blocks.0.0.weight", 1),
        "out_channels": weights.size(f"{UNET}out.2.weight"),
        "block_out_channels": channels,
        "layers_per_block": simplified([level.layers for level in levels]),
        "down_block_types": ["CrossAttnDownBlock2D" if level.depth else "DownBlock2D" for level in levels],
        "mid_block_type": middle_type(weights),
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
        "transformer_layers_per_block": simplified([level.depth or deepest or 1 for level in levels]),
        "attention_head_dim": 8,
        "cross_attention_dim": attending[-1].text_dim,
        "use_linear_projection": is_linear,
        "only_cross_attention": simplified([level.only_cross for level in levels]),
        **class_config(weights),
    }
    if is_linear and "num_class_embeds" not in config:
        config["attention_head_dim"] = simplified([max(1, width // 64) for width in channels])
    time_dim = weights.size(f"{UNET}time_embed.0.weight")
    if time_dim != 4 * channels[0]:
        config["time_embedding_dim"] = time_dim
    if weights.size(f"{UNET}input_blocks.1.0.emb_layers.1.weight") == 2 * channels[0]:
        config["resnet_time_scale_shift"] = "scale_shift"
    return config


def middle_type(weights: Checkpoint) -> str | None:
    if not any(name.startswith(f"{UNET}middle_block.") for name in weights):
        return None
    attends = f"{UNET}middle_block.1.proj_in.weight" in weights
    return "UNetMidBlock2DCrossAttn" if attends else "UNetMidBlock2D"


def class_config(weights: Checkpoint) -> Config:
    """The class embedding of a UNet: none, of a whole number, or of a number that is embedded like the timestep.

    Raises:
        ValueError: it has another one.
    """
    numbered, embedded = f"{UNET}label_emb.weight", f"{UNET}label_emb.0.0.weight"
    if numbered in weights:
        return {"num_class_embeds": weights.size(numbered)}
    if embedded not in weights:
        return {}
    kind = text_kind(weights)
    if kind in ADDED:
        beginning, count, what = ADDED[kind]
        added = weights.size(embedded, 1) - weights.size(f"{beginning}text_projection", 1)
        if added != count * SIZES_DIM:
            raise ValueError(f"{weights.file}: {embedded} takes {added} numbers besides the pooled embedding; {what}")
        given = weights.size(embedded, 1)
        return {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZES_DIM,
            "projection_class_embeddings_input_dim": given,
        }
    if weights.size(embedded, 1) != weights.size(f"{UNET}time_embed.0.weight", 1):
        raise ValueError(
            f"{weights.file}: its UNet takes more conditions than a timestep and text ({embedded}), as in Stable "
            f"Diffusion XL and unCLIP, which is not supported"
        )
    return {"class_embed_type": "timestep"}


def vae_config(weights: Checkpoint) -> Config:
    """diffusers' config of the autoencoder in a checkpoint, without its ``scaling_factor`` and ``sample_size``.

    Raises:
        ValueError: it is not one of Latent Diffusion's.
    """
    levels = numbers(weights, f"{VAE}encoder.down.")
    attends = [f"{VAE}encoder.down.{i}.attn.0.q.weight" in weights for i in levels]
    latent_channels = weights.size(f"{VAE}decoder.conv_in.weight", 1)
    config: Config = {
        "in_channels": weights.size(f"{VAE}encoder.conv_in.weight", 1),
        "out_channels": weights.size(f"{VAE}decoder.conv_out.weight"),
        "latent_channels": latent_channels,
        "block_out_channels": [weights.size(f"{VAE}encoder.down.{i}.block.0.conv2.weight") for i in levels],
        "layers_per_block": len(numbers(weights, f"{VAE}encoder.down.0.block.")),
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
    gives, takes = weights.size(f"{VAE}encoder.conv_out.weight"), weights.size(f"{VAE}decoder.conv_in.weight", 1)
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


def text_kind(weights: Checkpoint) -> str | None:
    """Which text encoder a checkpoint has: "clip" (1.x), "open_clip" (2.x), "bert" (Latent Diffusion), "first of two"
    (SDXL), "second alone" (its refiner) or None.
    """
    if f"{ALONE}token_embedding.weight" in weights:
        return "second alone"
    if f"{FIRST}text_model.embeddings.token_embedding.weight" in weights:
        return "first of two"
    if f"{OPEN_CLIP}token_embedding.weight" in weights:
        return "open_clip"
    if f"{BERT}token_emb.weight" in weights:
        return "bert"
    if f"{CLIP}text_model.embeddings.token_embedding.weight" in weights:
        return "clip"
    return None


def text_config(weights: Checkpoint, kind: str) -> Config:
    """transformers' config of the CLIP text encoder in a checkpoint, or that of diffusers' ``LDMBertModel``.

    Raises:
        ValueError: it is incomplete.
    """
    configs: dict[str, Callable[[Checkpoint], Config]] = {
        "bert": bert_config,
        "clip": clip_config,
        "open_clip": open_clip_config,
        "first of two": partial(clip_config, beginning=FIRST),
        "second of two": second_config,
        "second alone": partial(second_config, beginning=ALONE),
    }
    return configs[kind](weights)


def bert_config(weights: Checkpoint) -> Config:
    """The config of Latent Diffusion's text encoder, from x-transformers, with two layers each; it has 8 heads."""
    layers = numbers(weights, f"{BERT}attn_layers.layers.")
    return {
        "vocab_size": weights.size(f"{BERT}token_emb.weight"),
        "max_position_embeddings": weights.size(f"{BERT}pos_emb.emb.weight"),
        "encoder_layers": len(layers) // 2,
        "encoder_ffn_dim": weights.size(f"{BERT}attn_layers.layers.1.1.net.0.0.weight"),
        "encoder_attention_heads": 8,
        "head_dim": weights.size(f"{BERT}attn_layers.layers.0.1.to_q.weight") // 8,
        "d_model": weights.size(f"{BERT}token_emb.weight", 1),
    }


def clip_config(weights: Checkpoint, beginning: str = CLIP) -> Config:
    body = f"{beginning}text_model."
    embeddings = (f"{body}embeddings.token_embedding.weight", f"{body}embeddings.position_embedding.weight")
    config = tower_config(weights, *embeddings, f"{body}encoder.layers.", "mlp.fc1.weight")
    eos = config["eos_token_id"]
    return config | {"hidden_act": "quick_gelu", "projection_dim": config["hidden_size"], "pad_token_id": eos}


def open_clip_config(weights: Checkpoint) -> Config:
    """The config of an open_clip tower, without its last layer: Stable Diffusion 2 takes the states before it."""
    embeddings = (f"{OPEN_CLIP}token_embedding.weight", f"{OPEN_CLIP}positional_embedding")
    config = tower_config(weights, *embeddings, f"{OPEN_CLIP}transformer.resblocks.", "mlp.c_fc.weight")
    layers, is_large = config["num_hidden_layers"], config["hidden_size"] == 1024
    is_whole = layers == 24 if is_large else f"{OPEN_CLIP}text_projection" in weights  # ViT-H, or others
    return config | {
        "num_hidden_layers": layers - is_whole,
        "hidden_act": "gelu",
        "projection_dim": 512,
        "pad_token_id": 0,
    }


def second_config(weights: Checkpoint, beginning: str = SECOND) -> Config:
    """The config of SDXL's second text encoder, of open_clip, with its projection."""
    embeddings = (f"{beginning}token_embedding.weight", f"{beginning}positional_embedding")
    config = tower_config(weights, *embeddings, f"{beginning}transformer.resblocks.", "mlp.c_fc.weight")
    projected = weights.size(f"{beginning}text_projection", 1)
    return config | {"hidden_act": "gelu", "projection_dim": projected, "pad_token_id": 0}


def tower_config(weights: Checkpoint, tokens: str, positions: str, layers: str, first_linear: str) -> Config:
    """What the configs of CLIP's text encoders have in common."""
    vocabulary, width = weights.size(tokens), weights.size(tokens, 1)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.size(f"{layers}0.{first_linear}"),
        "num_hidden_layers": len(numbers(weights, layers)),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.size(positions),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
