"""DiT's released checkpoints (Peebles & Xie 2023), in which all blocks share what embeds times and classes."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from latentdiff.interchange.single_file.checkpoint import Checkpoint
from latentdiff.interchange.single_file.names import Layout, Place
from latentdiff.interchange.single_file.reading import build
from latentdiff.interchange.single_file.shapes import Config, numbers

SHARED = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
IN_BLOCKS: dict[str, tuple[str, int | None]] = {
    "norm1.linear": ("adaLN_modulation.1", None),
    "attn1.to_q": ("attn.qkv", 0),
    "attn1.to_k": ("attn.qkv", 1),
    "attn1.to_v": ("attn.qkv", 2),
    "attn1.to_out.0": ("attn.proj", None),
    "ff.net.0.proj": ("mlp.fc1", None),
    "ff.net.2": ("mlp.fc2", None),
}
WIDE_HEADS = {1152: 72}
"""Width of a head, by that of the network, where it is not 64."""


def dit_place(key: str, config: Mapping[str, Any]) -> Place:
    """Where a weight of `DiTTransformer2DModel` stands: its name, and which third of it, if it is one."""
    block, name, kind = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.+)\.(weight|bias)", key).groups()  # type: ignore[union-attr]
    if name in SHARED:
        return f"{SHARED[name]}.{kind}", None
    place, third = IN_BLOCKS[name]
    return f"blocks.{block}.{place}.{kind}", third


LAYOUT = Layout(
    "DiT", dit_place, "x_embedder.", ("x_embedder.", "t_embedder.", "y_embedder.", "blocks.", "final_layer.")
)


def is_dit(weights: Checkpoint) -> bool:
    """Whether the names are those of DiT's released code."""
    return {"x_embedder.proj.weight", "final_layer.adaLN_modulation.1.weight", "pos_embed"} <= set(weights)


def read_dit(weights: Checkpoint, kind: Any, dtype: torch.dtype | None, heads: int | None = None) -> Any:
    """The `DiTTransformer2DModel` in a checkpoint.

    Args:
        kind: that class.
        dtype: of the weights; None keeps the file's.
        heads: of every attention, which weights do not show; by default as in the released sizes.

    Raises:
        ValueError: the file has none, or one that is not supported; see `build`.
    """
    if not is_dit(weights):
        raise ValueError(f"{weights.file} has no weights of the names of DiT's released code")
    config = dit_config(weights, heads)
    network = build(weights, LAYOUT, lambda: kind.from_config(config), dtype)
    network.pos_embed.make_positions()  # which are no weights, and were made without values
    return network


def dit_config(weights: Checkpoint, heads: int | None) -> Config:
    """Its config.

    Raises:
        ValueError: the heads do not divide the width, or the grid is no square.
    """
    width, channels, patch = (weights.size("x_embedder.proj.weight", i) for i in (0, 1, 2))
    head = WIDE_HEADS.get(width, 64) if heads is None else width // max(heads, 1)
    if not head or width % head or (heads is not None and head * heads != width):
        asked = "heads of 64 numbers do" if heads is None else f"heads={heads} does"
        raise ValueError(f"{weights.file}: the network is {width} wide, which {asked} not divide; give heads=")
    side = math.isqrt(weights.size("pos_embed", 1))
    if side**2 != weights.size("pos_embed", 1):
        raise ValueError(f"{weights.file}: its pos_embed is of {weights.size('pos_embed', 1)} places, no square")
    return {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": weights.size("final_layer.linear.weight") // patch**2,
        "num_layers": len(numbers(weights, "blocks.")),
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": weights.size("y_embedder.embedding_table.weight") - 1,
        "norm_eps": 1e-6,
        "freq_shift": 0,
    }
