"""The same drawing by our pipeline and by diffusers'."""

from typing import Any

import torch


def largest_difference(ours: Any, theirs: Any, **call: Any) -> float:
    """Of two pictures in [0, 1], drawn with equal generators."""
    pictures = []
    for pipeline in (ours, theirs):
        generator = torch.Generator().manual_seed(7)
        pictures.append(
            pipeline(**{"num_inference_steps": 6, "output_type": "np", "generator": generator, **call}).images
        )
    assert pictures[0].shape == pictures[1].shape
    assert pictures[0].std() > 0.01  # a picture, not a plain colour
    return float(abs(pictures[0] - pictures[1]).max())
