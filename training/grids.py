"""Pictures of how a run is doing."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def to_image(pixels: Tensor) -> Image.Image:
    """A picture from (3, H, W) in [-1, 1]."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """`images`, all of one size, in rows of `columns` on white."""
    if not images:
        raise ValueError("a grid needs at least one image")
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        grid.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return grid


def save_image(image: Image.Image, file: Path) -> None:
    """Write `image` whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    image.save(partial, format="PNG")
    os.replace(partial, file)
