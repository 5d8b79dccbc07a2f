"""Ideal pictures: what a prompt asks for, composed of real drawings that the judge has never seen.

What the measures give these pictures is the ceiling: no model can be asked for more.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import layouts
from .background_colours import SHADES
from .colour import colour_name, to_rgb, turn
from .drawings import Drawing
from .layouts import Place
from .prompts import Asked, Prompt, Size, Where
from .scenes import Item, placed

WHITE = (255, 255, 255)


class Ideals:
    """Composes pictures, (size, size), of the drawings of one icon set; styles that it has not come from the others."""

    def __init__(self, drawings: Sequence[Drawing], set_name: str, size: int = 128) -> None:
        self.size, self.set_name = size, set_name
        self.plain: dict[str, Drawing] = {}
        self.styled: dict[tuple[str, str], Drawing] = {}
        for drawing in drawings:
            if drawing.turned:
                continue
            hexcode = drawing.concept.hexcode
            if drawing.set_name == set_name:
                self.plain.setdefault(hexcode, drawing)
                self.styled[hexcode, drawing.style] = drawing
            self.styled.setdefault((hexcode, drawing.style), drawing)
        if not self.plain:
            raise ValueError(f"none of {len(drawings)} drawings is of the icon set {set_name!r}")

    def __call__(self, prompt: Prompt) -> Image.Image | None:
        """None where the set has no such drawing, or one that cannot be turned to the colour."""
        rng = random.Random(prompt.text)
        drawings = [self.drawing(asked, prompt) for asked in prompt.things]
        places = places_of(prompt, rng)
        if prompt.count is not None:
            drawings *= prompt.count
        ground = WHITE if prompt.background is None else ground_of(prompt.background)
        picture = Image.new("RGB", (self.size, self.size), ground)
        for drawing, place in zip(drawings, places, strict=True):
            if drawing is None:
                return None
            cut, corner = placed(Item(drawing, place), self.size)
            picture.paste(cut, corner, cut)
        return picture

    def drawing(self, asked: Asked, prompt: Prompt) -> Drawing | None:
        """Of the thing in the style and colour that the prompt asks for."""
        found = self.plain.get(asked.hexcode)
        if prompt.style is not None:
            found = self.styled.get((asked.hexcode, prompt.style))
        if found is None or prompt.colour is None or found.colour == prompt.colour:
            return found
        turned = turn(found.rgba, prompt.colour)
        if turned is None or colour_name(turned, 0.4) != prompt.colour:
            return None
        return with_pixels(found, turned)


def with_pixels(drawing: Drawing, rgba: NDArray[np.uint8]) -> Drawing:
    return replace(drawing, rgba=rgba, turned=True)


def places_of(prompt: Prompt, rng: random.Random) -> list[Place]:
    """One for each thing in the order of the prompt, as training lays them out."""
    if prompt.count is not None:
        return layouts.several(rng, prompt.count)
    where = prompt.things[0].where
    if where != Where.ALONE:
        upright = where == Where.TOP or (where == Where.ANYWHERE and rng.random() < 0.4)
        return (layouts.column if upright else layouts.row)(rng, [rng.uniform(0.36, 0.47) for _ in prompt.things])
    if prompt.size is not None:
        return [layouts.small(rng) if prompt.size == Size.SMALL else layouts.big(rng)]
    return [layouts.alone(rng)]


def ground_of(name: str) -> tuple[int, int, int]:
    """The middle of the shade."""
    lightness, chroma, hue, *_ = SHADES[name]
    red, green, blue = to_rgb(np.array([lightness]), np.array([chroma]), np.array([hue]))[0] * 255
    return round(red), round(green), round(blue)
