"""The names of weights in the original checkpoints of Latent Diffusion and Stable Diffusion.

Every function maps the name of a weight in diffusers' (and our) networks to its name in the original code. This
direction serves both reading and writing: to read a checkpoint, the network is built first, and then each of its
weights is looked up by its original name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

UNET, VAE = "model.diffusion_model.", "first_stage_model."
VAE_PARTS = tuple(VAE + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize."))
"""Prefixes of the names of an autoencoder's weights; a training checkpoint has those of its losses besides."""

CODEBOOK, GUMBEL_CODEBOOK = f"{VAE}quantize.embedding.weight", f"{VAE}quantize.embed.weight"
CLIP, OPEN_CLIP, BERT = "cond_stage_model.transformer.", "cond_stage_model.model.", "cond_stage_model.transformer."

RESNET = {  # the UNet's; the autoencoder's keep their names
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(key: str, config: Mapping[str, Any]) -> str:
    """The original name of a UNet's weight; `config` is diffusers'."""
    count = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    layers = list(layers) if isinstance(layers, Sequence) else [layers] * count
    module, _, leaf = key.rpartition(".")
    if module in UNET_ENDS:
        return f"{UNET}{UNET_ENDS[module]}.{leaf}"
    parts = key.split(".")
    if parts[0] == "mid_block":
        kind, number, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        return f"{UNET}middle_block.{1 if kind == 'attentions' else 2 * number}.{unet_part(kind, rest)}"
    level, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    if parts[0] == "down_blocks":
        block = 1 + sum(layers[:level]) + level + (layers[level] if kind == "downsamplers" else number)
        if kind == "downsamplers":
            return f"{UNET}input_blocks.{block}.0.op.{rest.removeprefix('conv.')}"
        return f"{UNET}input_blocks.{block}.{int(kind == 'attentions')}.{unet_part(kind, rest)}"
    upward = layers[::-1]
    block = sum(upward[:level]) + level + (upward[level] if kind == "upsamplers" else number)
    if kind == "upsamplers":
        place = 1 + ("Attn" in config["up_block_types"][level])
        return f"{UNET}output_blocks.{block}.{place}.{rest}"
    return f"{UNET}output_blocks.{block}.{int(kind == 'attentions')}.{unet_part(kind, rest)}"


def unet_part(kind: str, rest: str) -> str:
    """The same within a resnet block or a transformer; those in transformers keep their names."""
    if kind == "attentions":
        return rest
    module, _, leaf = rest.rpartition(".")
    return f"{RESNET[module]}.{leaf}"


def vae_name(key: str, config: Mapping[str, Any]) -> str:
    """The original name of an autoencoder's weight; `config` is diffusers'."""
    count = len(config["block_out_channels"])
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", key)
    key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{count - 1 - int(m[1])}", key)
    key = re.sub(r"(down|up)\.(\d+)\.attentions\.(\d+)", r"\1.\2.attn.\3", key)
    key = re.sub(r"(down|up)\.(\d+)\.resnets\.(\d+)", r"\1.\2.block.\3", key)
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    inside = re.fullmatch(r"(.*\.attn(?:_1|\.\d+))\.(.+)\.(weight|bias)", key)
    if inside:
        key = f"{inside[1]}.{VAE_ATTENTION[inside[2]]}.{inside[3]}"
    return VAE + key


def gumbel_name(key: str, config: Mapping[str, Any]) -> str:
    """The name of a `GumbelVQModel`'s weight in the code of Taming Transformers."""
    return GUMBEL_CODEBOOK if key == "quantize.embedding.weight" else vae_name(key, config)


def clip_name(key: str) -> str:
    """The original name of a weight of transformers' CLIP text model."""
    return f"{CLIP}text_model.{key.removeprefix('text_model.')}"


OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Modules of transformers' CLIP whose weights open_clip stacks in one tensor."""


def open_clip_name(key: str) -> tuple[str, int | None]:
    """The name in open_clip of a weight of transformers' CLIP text model, and which third of it; None for the whole."""
    key = key.removeprefix("text_model.")
    if key in OPEN_CLIP_ENDS:
        return OPEN_CLIP + OPEN_CLIP_ENDS[key], None
    _, _, number, rest = key.split(".", 3)  # encoder.layers.N....
    module, _, leaf = rest.rpartition(".")
    block = f"{OPEN_CLIP}transformer.resblocks.{number}"
    if module in JOINED:
        return f"{block}.attn.in_proj_{leaf}", JOINED.index(module)
    return f"{block}.{OPEN_CLIP_LAYER[module]}.{leaf}", None


BERT_ENDS = {
    "model.embed_tokens.weight": "token_emb.weight",
    "model.embed_positions.weight": "pos_emb.emb.weight",
    "model.layer_norm.weight": "norm.weight",
    "model.layer_norm.bias": "norm.bias",
    "to_logits.weight": "to_logits.weight",
    "to_logits.bias": "to_logits.bias",
}
BERT_LAYER = {  # which of the two sub-layers, and the name in it
    "self_attn_layer_norm": (0, "0"),
    "self_attn.q_proj": (0, "1.to_q"),
    "self_attn.k_proj": (0, "1.to_k"),
    "self_attn.v_proj": (0, "1.to_v"),
    "self_attn.out_proj": (0, "1.to_out"),
    "final_layer_norm": (1, "0"),
    "fc1": (1, "1.net.0.0"),
    "fc2": (1, "1.net.2"),
}


def bert_name(key: str) -> str:
    """The original name of a weight of diffusers' ``LDMBertModel``, the text encoder of Latent Diffusion."""
    if key in BERT_ENDS:
        return BERT + BERT_ENDS[key]
    _, _, number, rest = key.split(".", 3)  # model.layers.N....
    module, _, leaf = rest.rpartition(".")
    half, name = BERT_LAYER[module]
    return f"{BERT}attn_layers.layers.{2 * int(number) + half}.{name}.{leaf}"
