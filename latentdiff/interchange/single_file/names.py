"""The names of weights in the original checkpoints of Latent Diffusion, Stable Diffusion, DDPM and ADM.

Every function maps the name of a weight in diffusers' (and our) networks to its place in the original code. This
direction serves both reading and writing: to read a checkpoint, the network is built first, and then each of its
weights is looked up by its original name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

Place = tuple[str, int | None]
"""An original name, and which third of its tensor, where the original stacks three; None for the whole."""

Config = Mapping[str, Any]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
VAE_PARTS = tuple(VAE + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize."))
"""Prefixes of the names of an autoencoder's weights; a training checkpoint has those of its losses besides."""

CODEBOOK, GUMBEL_CODEBOOK = f"{VAE}quantize.embedding.weight", f"{VAE}quantize.embed.weight"
CLIP, OPEN_CLIP, BERT = "cond_stage_model.transformer.", "cond_stage_model.model.", "cond_stage_model.transformer."

FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
"""SDXL's text encoders: transformers' CLIP and open_clip's."""
ALONE = "conditioner.embedders.0.model."
"""The second of them, the only one of SDXL's refiner."""

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
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL's, in the place of a class embedding
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
THIRDS = {"to_q": 0, "to_k": 1, "to_v": 2}
ADM_ATTENTION: dict[str, Place] = {  # of networks without text; transformers keep their names
    "group_norm": ("norm", None),
    "to_out.0": ("proj_out", None),
    **{name: ("qkv", third) for name, third in THIRDS.items()},
}
ADM_POOL: dict[str, Place] = {
    "to_out": ("c_proj", None),
    **{name: ("qkv_proj", third) for name, third in THIRDS.items()},
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_place(key: str, config: Config) -> Place:
    """The place of a weight of a UNet, with text or without, or of a noisy classifier; `config` is diffusers'."""
    module, _, leaf = key.rpartition(".")
    if module.startswith("head"):
        return classifier_head_place(module, leaf)
    if module in UNET_ENDS:
        return f"{UNET}{UNET_ENDS[module]}.{leaf}", None
    block, kind, rest = unet_block(module.split("."), config)
    third: int | None = None
    if kind == "attentions":
        rest, third = ADM_ATTENTION.get(rest, (rest, None))
    elif rest != "conv":
        rest = RESNET[rest]
    elif block.startswith("input_blocks"):
        rest = "op"
    return f"{UNET}{block}.{rest}.{leaf}", third


def unet_block(parts: list[str], config: Config) -> tuple[str, str, str]:
    """The original name of the block that a module is in, its kind in diffusers, and the module's name in it."""
    if parts[0] == "mid_block":
        kind, number = parts[1], int(parts[2])
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}", kind, ".".join(parts[3:])
    level, kind, number = int(parts[1]), parts[2], int(parts[3])
    layers = config["layers_per_block"]
    layers = list(layers) if isinstance(layers, Sequence) else [layers] * len(config["block_out_channels"])
    down = parts[0] == "down_blocks"
    layers = layers if down else layers[::-1]
    first = sum(layers[:level]) + level + down  # one more layer on each level of the way up
    place = int(kind == "attentions")
    if kind in ("downsamplers", "upsamplers"):
        number = layers[level]
        place = 0 if down else 1 + ("Attn" in config["up_block_types"][level])
    return f"{'input' if down else 'output'}_blocks.{first + number}.{place}", kind, ".".join(parts[4:])


def classifier_head_place(module: str, leaf: str) -> Place:
    """The place of a weight of a classifier's last layers."""
    if module == "head.2":
        return f"{UNET}out.3.{leaf}", None
    if module == "head":
        return f"{UNET}out.2.positional_embedding", None
    name, third = ADM_POOL[module.removeprefix("head.")]
    return f"{UNET}out.2.{name}.{leaf}", third


def vae_place(key: str, config: Config) -> Place:
    """The place of an autoencoder's weight; `config` is diffusers'."""
    last = len(config["block_out_channels"]) - 1
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", key)
    key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", key)
    key = re.sub(r"(down|up)\.(\d+)\.attentions\.(\d+)", r"\1.\2.attn.\3", key)
    key = re.sub(r"(down|up)\.(\d+)\.resnets\.(\d+)", r"\1.\2.block.\3", key)
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    inside = re.fullmatch(r"(.*\.attn(?:_1|\.\d+))\.(.+)\.(weight|bias)", key)
    if inside:
        key = f"{inside[1]}.{VAE_ATTENTION[inside[2]]}.{inside[3]}"
    return VAE + key, None


def gumbel_place(key: str, config: Config) -> Place:
    """The place of a `GumbelVQModel`'s weight in the code of Taming Transformers."""
    return (GUMBEL_CODEBOOK, None) if key == "quantize.embedding.weight" else vae_place(key, config)


def clip_place(key: str, config: Config, beginning: str = CLIP) -> Place:
    """The place of a weight of transformers' CLIP text model in Stable Diffusion 1."""
    return f"{beginning}text_model.{key.removeprefix('text_model.')}", None


OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",  # transposed
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


def open_clip_place(key: str, config: Config, beginning: str = OPEN_CLIP) -> Place:
    """The place in open_clip of a weight of transformers' CLIP text model."""
    key = key.removeprefix("text_model.")
    if key in OPEN_CLIP_ENDS:
        return beginning + OPEN_CLIP_ENDS[key], None
    _, _, number, rest = key.split(".", 3)  # encoder.layers.N....
    module, _, leaf = rest.rpartition(".")
    block = f"{beginning}transformer.resblocks.{number}"
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


def bert_place(key: str, config: Config) -> Place:
    """The place of a weight of diffusers' ``LDMBertModel``, the text encoder of Latent Diffusion."""
    if key in BERT_ENDS:
        return BERT + BERT_ENDS[key], None
    _, _, number, rest = key.split(".", 3)  # model.layers.N....
    module, _, leaf = rest.rpartition(".")
    half, name = BERT_LAYER[module]
    return f"{BERT}attn_layers.layers.{2 * int(number) + half}.{name}.{leaf}", None


@dataclass(frozen=True)
class Layout:
    """How the weights of one kind of network stand in an original checkpoint."""

    part: str
    """What messages call the network."""
    place: Callable[[str, Config], Place]
    beginning: str
    """Of the original names."""
    complete: tuple[str, ...] = ()
    """Beginnings of original names that must all have a place in the network."""
    transposed: tuple[str, ...] = ()
    """Original names of matrices that stand the other way round."""


LAYOUTS = {
    "unet": Layout("UNet", unet_place, UNET, (UNET,)),
    "classifier": Layout("classifier", unet_place, UNET, (UNET,)),
    "vae": Layout("autoencoder", vae_place, VAE, VAE_PARTS[:4]),
    "gumbel": Layout("autoencoder", gumbel_place, VAE, VAE_PARTS[:4]),
    "clip": Layout("text encoder", clip_place, CLIP),
    "open_clip": Layout("text encoder", open_clip_place, OPEN_CLIP),
    "bert": Layout("text encoder", bert_place, BERT),
    "first of two": Layout("first text encoder", partial(clip_place, beginning=FIRST), FIRST),
    "second of two": Layout(
        "second text encoder",
        partial(open_clip_place, beginning=SECOND),
        SECOND,
        transposed=(f"{SECOND}text_projection",),
    ),
    "second alone": Layout(
        "text encoder", partial(open_clip_place, beginning=ALONE), ALONE, transposed=(f"{ALONE}text_projection",)
    ),
}
"""Of an autoencoder `complete` leaves out the codebook, which can have its training state beside the codes."""
