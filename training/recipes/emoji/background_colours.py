"""Plain coloured backgrounds, by the names that captions use."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .colour import to_oklch, to_rgb

# (L, C, hue in degrees) in OKLCH, and how far lightness and hue may stray.
SHADES: dict[str, tuple[float, float, float, float, float]] = {
    "red": (0.60, 0.22, 27.0, 0.04, 5.0),
    "orange": (0.74, 0.17, 58.0, 0.03, 6.0),
    "yellow": (0.89, 0.17, 97.0, 0.03, 6.0),
    "green": (0.66, 0.18, 143.0, 0.06, 9.0),
    "blue": (0.56, 0.18, 258.0, 0.06, 8.0),
    "purple": (0.52, 0.19, 304.0, 0.05, 7.0),
    "pink": (0.78, 0.13, 355.0, 0.04, 7.0),
    "brown": (0.46, 0.08, 55.0, 0.05, 6.0),
    "black": (0.08, 0.0, 0.0, 0.08, 0.0),
    "gray": (0.68, 0.0, 0.0, 0.08, 0.0),
    "light blue": (0.85, 0.08, 235.0, 0.03, 12.0),
    "dark blue": (0.36, 0.13, 264.0, 0.03, 5.0),
    "light green": (0.88, 0.11, 145.0, 0.03, 9.0),
    "dark green": (0.39, 0.09, 150.0, 0.04, 8.0),
    "light gray": (0.85, 0.0, 0.0, 0.03, 0.0),
    "dark gray": (0.48, 0.0, 0.0, 0.03, 0.0),
    "beige": (0.91, 0.04, 85.0, 0.02, 8.0),
}
FREQUENT = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "gray", "brown", "light blue")
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Background:
    """A plain background: what it is called and its colour, three whole numbers 0 to 255."""

    name: str
    rgb: tuple[int, int, int]


def choose(rng: random.Random, without: Sequence[str] = ()) -> Background:
    """A background in a colour that is not in `without`; the frequent ones three times as often as the others."""
    names = [name for name in SHADES if name not in without]
    name = rng.choices(names, [3 if name in FREQUENT else 1 for name in names])[0]
    lightness, chroma, hue, light_stray, hue_stray = SHADES[name]
    lightness += rng.uniform(-light_stray, light_stray)
    chroma *= rng.uniform(0.88, 1.06)
    hue += rng.uniform(-hue_stray, hue_stray)
    red, green, blue = to_rgb(np.array([max(lightness, 0)]), np.array([chroma]), np.array([hue % 360]))[0] * 255
    return Background(name, (round(red), round(green), round(blue)))


def drowned(rgba: NDArray[np.uint8], step: int = 6, near: float = 0.12) -> dict[str, float]:
    """For each background, the share of an (H, W, 4) drawing's opaque pixels that could not be told from it."""
    some = rgba[step // 2 :: step, step // 2 :: step]
    pixels = some[some[..., 3] > 128][:, :3] / 255.0
    if not len(pixels):
        return dict.fromkeys(SHADES, 1.0)
    distance = np.linalg.norm(_lab(*to_oklch(pixels))[:, None] - _centres(), axis=-1)  # (pixels, backgrounds)
    return dict(zip(SHADES, (distance < near).mean(0).tolist(), strict=True))


@lru_cache(maxsize=1)
def _centres() -> NDArray[np.floating]:
    """The backgrounds in OKLab, (backgrounds, 3)."""
    lightness, chroma, hue, *_ = np.array(list(SHADES.values())).T
    return _lab(lightness, chroma, hue)


def _lab(
    lightness: NDArray[np.floating], chroma: NDArray[np.floating], hue: NDArray[np.floating]
) -> NDArray[np.floating]:
    angle = np.radians(hue)
    return np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], -1)
