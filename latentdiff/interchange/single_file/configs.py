"""The configs of the networks in a checkpoint, inferred from the shapes of their weights.

What shapes do not determine is assumed to be as in Stable Diffusion: 8 attention heads where a transformer's
projections are convolutions (1.x, Latent Diffusion) and in the upscaler, one head for every 64 channels where they are
linear (2.x); 32 groups of normalisation.
"""

import re
from collections.abc import Iterable
from typing import Any

from latentdiff.interchange.single_file.files import Checkpoint
from latentdiff.interchange.single_file.names import BERT, CLIP, OPEN_CLIP, UNET

Config = dict[str, Any]


def numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The distinct numbers that the group of `pattern`, matched at the start of `names`, has; in ascending order."""
    found = (re.match(pattern, name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def simplified(values: list[Any]) -> Any:
    """One value if all are equal, else the list."""
    return values[0] if all(value == values[0] for value in values) else values


class UNetShapes:
    """A UNet's levels, inferred from the way down."""

    def __init__(self, weights: Checkpoint) -> None:
        self.weights = weights
        self.channels: list[int] = []
        self.layers: list[int] = []
        self.depths: list[int] = []
        self.only_cross: list[bool] = []
        self.text_dim = 0
        self.linear = False
        self.new_level()
        for i in numbers(weights, re.escape(UNET) + r"input_blocks\.(\d+)\.")[1:]:
            self.read_block(f"{UNET}input_blocks.{i}.")

    def new_level(self) -> None:
        self.channels.append(0)
        self.layers.append(0)
        self.depths.append(0)
        self.only_cross.append(False)

    def read_block(self, block: str) -> None:
        weights = self.weights
        if f"{block}0.op.weight" in weights:
            self.new_level()
            return
        self.channels[-1] = weights.shape(f"{block}0.in_layers.2.weight")[0]
        self.layers[-1] += 1
        if f"{block}1.proj_in.weight" not in weights:
            return
        self.depths[-1] = len(numbers(weights, re.escape(block) + r"1\.transformer_blocks\.(\d+)\."))
        self.linear = len(weights.shape(f"{block}1.proj_in.weight")) == 2
        self.text_dim = weights.shape(f"{block}1.transformer_blocks.0.attn2.to_k.weight")[1]
        first = weights.shape(f"{block}1.transformer_blocks.0.attn1.to_k.weight")[1]
        self.only_cross[-1] = first != self.channels[-1]

    def up_attention(self) -> list[bool]:
        """Whether the levels have transformers on the way up, beginning at the lowest resolution."""
        found, block = [], 0
        for layers in self.layers[::-1]:
            found.append(f"{UNET}output_blocks.{block}.1.proj_in.weight" in self.weights)
            block += layers + 1
        return found


def unet_config(weights: Checkpoint) -> Config:
    """diffusers' config of the UNet in a checkpoint, without its ``sample_size``.

    Raises:
        ValueError: it is not one of Latent Diffusion's with cross-attention.
    """
    try:
        shapes = UNetShapes(weights)
        conv_in, conv_out = weights.shape(f"{UNET}input_blocks.0.0.weight"), weights.shape(f"{UNET}out.2.weight")
        time_dim = weights.shape(f"{UNET}time_embed.0.weight")[0]
        resnet = weights.shape(f"{UNET}input_blocks.1.0.emb_layers.1.weight")[0]
        up = shapes.up_attention()
    except KeyError as error:
        raise ValueError(f"{weights.file}: the UNet is not one of Latent Diffusion's; it has no {error}") from None
    if not shapes.text_dim:
        raise ValueError(f"{weights.file}: the UNet has no cross-attention, so no text could tell it what to draw")
    down = [depth > 0 for depth in shapes.depths]
    config: Config = {
        "in_channels": conv_in[1],
        "out_channels": conv_out[0],
        "block_out_channels": shapes.channels,
        "layers_per_block": simplified(shapes.layers),
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in down],
        "mid_block_type": middle_type(weights),
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up],
        "transformer_layers_per_block": simplified([depth or 1 for depth in shapes.depths]),
        "attention_head_dim": 8,
        "cross_attention_dim": shapes.text_dim,
        "use_linear_projection": shapes.linear,
        "only_cross_attention": simplified(shapes.only_cross),
        **class_config(weights),
    }
    if shapes.linear and "num_class_embeds" not in config:
        config["attention_head_dim"] = simplified([max(1, channels // 64) for channels in shapes.channels])
    if time_dim != 4 * shapes.channels[0]:
        config["time_embedding_dim"] = time_dim
    if resnet == 2 * shapes.channels[0]:
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
        return {"num_class_embeds": weights.shape(numbered)[0]}
    if embedded not in weights:
        return {}
    if weights.shape(embedded)[1] != weights.shape(f"{UNET}time_embed.0.weight")[1]:
        raise ValueError(
            f"{weights.file}: its UNet takes more conditions than a timestep and text ({embedded}), as in Stable "
            f"Diffusion XL and unCLIP, which is not supported"
        )
    return {"class_embed_type": "timestep"}


def text_kind(weights: Checkpoint) -> str | None:
    """Which text encoder a checkpoint has: "clip" (1.x), "open_clip" (2.x), "bert" (Latent Diffusion) or None."""
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
        ValueError: its layers are not what they should be.
    """
    try:
        return {"bert": bert_config, "clip": clip_config, "open_clip": open_clip_config}[kind](weights)
    except KeyError as error:
        raise ValueError(f"{weights.file}: the text encoder is incomplete; it has no {error}") from None


def bert_config(weights: Checkpoint) -> Config:
    """The config of Latent Diffusion's text encoder, from x-transformers, with two layers each; it has 8 heads."""
    layers = numbers(weights, re.escape(BERT) + r"attn_layers\.layers\.(\d+)\.")
    vocabulary, width = weights.shape(f"{BERT}token_emb.weight")
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": weights.shape(f"{BERT}pos_emb.emb.weight")[0],
        "encoder_layers": len(layers) // 2,
        "encoder_ffn_dim": weights.shape(f"{BERT}attn_layers.layers.1.1.net.0.0.weight")[0],
        "encoder_attention_heads": 8,
        "head_dim": weights.shape(f"{BERT}attn_layers.layers.0.1.to_q.weight")[0] // 8,
        "d_model": width,
    }


def clip_config(weights: Checkpoint) -> Config:
    body = f"{CLIP}text_model."
    vocabulary, width = weights.shape(f"{body}embeddings.token_embedding.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{body}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": len(numbers(weights, re.escape(body) + r"encoder\.layers\.(\d+)\.")),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.shape(f"{body}embeddings.position_embedding.weight")[0],
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }


def open_clip_config(weights: Checkpoint) -> Config:
    """The config of an open_clip tower, without its last layer: Stable Diffusion 2 takes the states before it."""
    vocabulary, width = weights.shape(f"{OPEN_CLIP}token_embedding.weight")
    layers = len(numbers(weights, re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\."))
    is_whole = layers == 24 if width == 1024 else f"{OPEN_CLIP}text_projection" in weights  # ViT-H, or others
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight")[0],
        "num_hidden_layers": layers - is_whole,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": weights.shape(f"{OPEN_CLIP}positional_embedding")[0],
        "hidden_act": "gelu",
        "projection_dim": 512,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
