"""Pictures composed of drawings, without end, with captions that say what is where.

    composer = Composer(render_all(read_bundle(path)))
    scene = composer(7)

Scene number `index` is a pure function of the drawings, the seed and the index: any worker can make any scene. A scene
is first planned (what, where, what is said), then painted. Nothing that `held_out` names is drawn or said.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawings import SPLITS, Drawing
from .plans import Item, Plan, Planner

INK = 16  # alpha from which a pixel counts as drawn


@dataclass(frozen=True)
class Scene:
    """A picture, (size, size, 3) uint8 RGB, and one to four captions, the plainest first."""

    picture: NDArray[np.uint8]
    captions: tuple[str, ...]
    kind: str


class Composer:
    """Scenes, (size, size), of the drawings of one split, `train` or `validation`.

    Raises:
        ValueError: no such split, or no drawing of it that could stand in a scene.
    """

    def __init__(self, drawings: Sequence[Drawing], size: int = 128, seed: int = 0, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
        self.size, self.seed = size, seed
        self._planner = Planner([drawing for drawing in drawings if drawing.split == split])

    def __call__(self, index: int) -> Scene:
        """Scene number `index`, 0 or more."""
        plan = self.plan(index)
        return Scene(self.paint(plan), plan.captions, plan.kind)

    def plan(self, index: int) -> Plan:
        """What scene number `index` shows and says, before it is painted."""
        if index < 0:
            raise ValueError(f"index is {index}, expected 0 or more")
        return self._planner.plan(random.Random(f"{self.seed} {index}"))

    def paint(self, plan: Plan) -> NDArray[np.uint8]:
        """The plan as pixels: (size, size, 3) uint8."""
        canvas = Image.new("RGB", (self.size, self.size), plan.background.rgb)
        for item in plan.items:
            drawing, corner = placed(item, self.size)
            canvas.paste(drawing, corner, drawing)
        return np.asarray(canvas)


def placed(item: Item, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The item's drawing, cut to its ink and scaled to its place in a picture of `size`, and its left upper corner."""
    rgba = item.drawing.rgba
    ink = rgba[..., 3] > INK
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    cut = Image.fromarray(rgba[top:bottom, left:right])
    if item.mirrored:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    zoom = item.place.side * size / max(cut.size)
    width, height = (max(1, round(side * zoom)) for side in cut.size)
    drawing = cut.resize((width, height), Image.Resampling.BICUBIC)
    return drawing, (round(item.place.x * size - width / 2), round(item.place.y * size - height / 2))
