"""The transformers of Taming Transformers' released checkpoints (Esser et al. 2021), which are minGPTs."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.single_file.checkpoint import OTHER_KIND, Checkpoint
from latentdiff.interchange.single_file.filling import filled
from latentdiff.interchange.single_file.names import CODEBOOK
from latentdiff.interchange.single_file.shapes import Config, numbers

GPT = "transformer."
TOKENS, PLACES = f"{GPT}tok_emb.weight", f"{GPT}pos_emb"
IN_BLOCKS = {
    "norm1": "ln1",
    "norm3": "ln2",
    "attn1.to_out": "attn.proj",
    "ff.0": "mlp.0",
    "ff.2": "mlp.2",
}
HEADS = {1024: 16, 1408: 16, 1536: 24, 1664: 16}
"""Of the released transformers, by width."""
USUAL_SIDE = 16
"""Of the grids of all released models: 256 pixels, a sixteenth."""


def read_transformer(
    weights: Checkpoint,
    kind: Any,
    dtype: torch.dtype | None,
    heads: int | None = None,
    num_classes: int | None = None,
    sample_size: int | None = None,
) -> Any:
    """The `TokenTransformer` in a checkpoint.

    A class is there the token of its number, and stands before the codes; without classes the token 0 does. No token is
    for no class: its embedding is 0, and guidance means nothing.

    Args:
        kind: that class.
        dtype: of the weights; None keeps the file's.
        heads, num_classes, sample_size: see `TokenTransformer.from_single_file`.

    Raises:
        ValueError: the file has none, or one that is told by other pictures, is not in raster order, or is damaged.
    """
    check_kind(weights)
    config = transformer_config(weights, heads, num_classes, sample_size)
    used: set[str] = set()

    def find(key: str) -> tuple[str, Tensor]:
        names, found = original(weights, key, config)
        used.update(names)
        return f"{weights.file}: {names[0]}", found

    network = filled(kind, config, weights.file, find, dtype)
    unused = [name for name in weights if name.startswith(GPT) and name not in used and not name.endswith("attn.mask")]
    if unused:
        raise ValueError(f"{weights.file}: {unused[0]} has no place in a TokenTransformer; {OTHER_KIND}")
    return network


def check_kind(weights: Checkpoint) -> None:
    """Raises ValueError for what is no transformer of one class or data set in raster order."""
    if TOKENS not in weights or PLACES not in weights:
        raise ValueError(f"{weights.file} has no weights of the names of Taming Transformers' transformer ({TOKENS})")
    if told := next((name for name in weights if name.startswith("cond_stage_model.")), None):
        raise ValueError(
            f"{weights.file}: its transformer is told what to draw by the codes of another picture ({told}), "
            f"which TokenTransformer does not know; models of classes or of one data set are read"
        )
    if order := next((name for name in weights if name.startswith("permuter.")), None):
        raise ValueError(f"{weights.file}: its codes are not in raster order ({order}), and no other is known")
    mask = f"{GPT}blocks.0.attn.mask"
    if mask in weights and weights.size(mask, 3) > 1 and bool(weights[mask][0, 0, 0, 1]):
        raise ValueError(f"{weights.file}: its first tokens see later ones ({mask}), which is not supported")


def transformer_config(weights: Checkpoint, heads: int | None, num_classes: int | None, side: int | None) -> Config:
    """Its config. Raises ValueError for heads, classes or a size that do not fit."""
    tokens, width, places = weights.size(TOKENS), weights.size(TOKENS, 1), weights.size(PLACES, 1)
    codes = weights.size(CODEBOOK) if CODEBOOK in weights else tokens
    heads = HEADS.get(width) if heads is None else heads
    if not heads or heads < 1 or width % heads:
        raise ValueError(
            f"{weights.file}: the transformer is {width} wide, and heads={heads} do not divide it; give heads="
        )
    side = min(USUAL_SIDE, math.isqrt(places)) if side is None else side
    if not 1 <= side**2 <= places:
        raise ValueError(f"{weights.file}: it knows {places} places, which sample_size={side} does not fit")
    for name, count in (("codes in the codebook", codes), ("classes", num_classes or 1)):
        if not 1 <= count <= tokens:
            raise ValueError(f"{weights.file}: it knows {tokens} tokens, and there are {count} {name}")
    found: Config = {
        "num_vq_embeddings": codes,
        "sample_size": side,
        "order": "raster",
        "num_layers": len(numbers(weights, f"{GPT}blocks.")),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "positions": "learned",
    }
    return found if num_classes is None else found | {"num_classes": num_classes, "label_first": True}


def original(weights: Checkpoint, key: str, config: Config) -> tuple[list[str], Tensor]:
    """What a weight of the network is in the file, and the names of what it was made of."""

    def take(*names: str) -> tuple[list[str], Tensor]:
        for name in names:
            if f"{GPT}{name}" not in weights:
                raise ValueError(f"{weights.file}: {GPT}{name} is missing; {OTHER_KIND}")
        return [GPT + name for name in names], torch.cat([weights[GPT + name] for name in names])

    codes = config["num_vq_embeddings"]
    if key == "token_embedding.weight":  # whose last one is what stands before the first code
        names, found = take("tok_emb.weight")
        return names, torch.cat([found[:codes], found[:1]])
    if key == "class_embedding.weight":
        names, found = take("tok_emb.weight")
        return names, torch.cat([found[: config["num_classes"]], torch.zeros_like(found[:1])])
    if key == "places":
        names, found = take("pos_emb")
        return names, found[0, : config["sample_size"] ** 2]
    if key == "head.weight":
        names, found = take("head.weight")
        return names, found[:codes]
    module, _, leaf = key.rpartition(".")
    if module == "norm_out":
        return take(f"ln_f.{leaf}")
    block, name = re.fullmatch(r"blocks\.(\d+)\.(.+)", module).groups()  # type: ignore[union-attr]
    if name == "attn1.to_qkv":
        return take(*(f"blocks.{block}.attn.{one}.{leaf}" for one in ("query", "key", "value")))
    return take(f"blocks.{block}.{IN_BLOCKS[name]}.{leaf}")
