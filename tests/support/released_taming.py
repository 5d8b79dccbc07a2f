"""The weights of a transformer of Taming Transformers' released code: its names and shapes, written down once more."""

import math

import torch
from torch import Tensor


def weights(tokens: int = 11, width: int = 8, places: int = 12, blocks: int = 2) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (tokens, width), "pos_emb": (1, places, width)}
    for block in (f"blocks.{number}" for number in range(blocks)):
        for name in ("ln1", "ln2"):
            shapes |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
        linear = {f"attn.{name}": (width, width) for name in ("key", "query", "value", "proj")}
        for name, shape in (linear | {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}).items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes[f"{block}.attn.mask"] = (1, 1, places, places)
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,), "head.weight": (tokens, width)}
    found: dict[str, Tensor] = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        values = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + 1.3 * i).float()
        is_mask = name.endswith("mask")
        found[f"transformer.{name}"] = torch.ones(shape).tril() if is_mask else values.reshape(shape)
    return found
