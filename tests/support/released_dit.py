"""A network of DiT's released code: its weights, inputs, and what it gives for them.

``released_dit.json`` holds, of a network of facebookresearch/DiT (``DiT(input_size=8, patch_size=2, in_channels=4,
hidden_size=128, depth=2, num_heads=2, num_classes=5)``), names and shapes of its weights, what it gives for `weights`
and `inputs`, and every 37th number of its positions.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.models.patches import positions

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("released_dit.json").read_text())


def weights() -> dict[str, Tensor]:
    found = {}
    for i, (key, shape) in enumerate(sorted(REFERENCE["shapes"].items())):
        values = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + 1.3 * i)
        if len(shape) > 1:
            values = values * 2 / math.prod(shape[1:]) ** 0.5
        else:
            values = 0.3 * values + (1.0 if key.endswith("weight") else 0.0)
        found[key] = values.float().reshape(shape)
    return {**found, "pos_embed": positions(128, 4, 4, 4, 1.0)}


def inputs() -> list[Tensor]:
    sample = torch.sin(torch.arange(1, 513, dtype=torch.float64) * 1.7).float().reshape(2, 4, 8, 8)
    return [sample, torch.tensor([137, 902]), torch.tensor([2, 5])]
