"""Colour names for drawings, and drawings in other colours, in OKLCH (Björn Ottosson 2020).

Lightness L is in 0..1, chroma C in 0..about 0.35, hue in degrees.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_LMS_INVERSE, _LAB_INVERSE = np.linalg.inv(_LMS), np.linalg.inv(_LAB)

# What a drawing turned to this colour gets for its main colour: (L, C, hue).
TARGETS: dict[str, tuple[float, float, float]] = {
    "red": (0.60, 0.22, 27.0),
    "orange": (0.75, 0.17, 60.0),
    "yellow": (0.87, 0.17, 90.0),
    "green": (0.66, 0.18, 142.0),
    "blue": (0.60, 0.17, 252.0),
    "purple": (0.55, 0.18, 305.0),
    "pink": (0.76, 0.15, 358.0),
    "brown": (0.50, 0.09, 52.0),
    "black": (0.30, 0.012, 270.0),
    "gray": (0.68, 0.012, 250.0),
}
COLOURS = (*TARGETS, "white")


def to_oklch(rgb: Array) -> tuple[Array, Array, Array]:
    """sRGB (..., 3) in 0..1 to lightness, chroma and hue in degrees 0..360, each (...)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ _LMS.T) @ _LAB.T
    hue = np.degrees(np.arctan2(lab[..., 2], lab[..., 1])) % 360
    return lab[..., 0], np.hypot(lab[..., 1], lab[..., 2]), hue


def to_rgb(lightness: Array, chroma: Array, hue: Array) -> Array:
    """OKLCH, each (N,), to sRGB (N, 3) in 0..1; chroma is lowered where sRGB does not reach it."""
    linear = _to_linear(lightness, chroma, hue)
    chroma = chroma.copy()
    outside = np.flatnonzero(_unreachable(linear))
    for _ in range(40):
        if not len(outside):
            break
        chroma[outside] *= 0.93
        linear[outside] = _to_linear(lightness[outside], chroma[outside], hue[outside])
        outside = outside[_unreachable(linear[outside])]
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def _unreachable(linear: Array) -> NDArray[np.bool_]:
    red, green, blue = linear.T
    lowest, highest = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    return (lowest < -1e-3) | (highest > 1 + 1e-3)


def _to_linear(lightness: Array, chroma: Array, hue: Array) -> Array:
    angle = np.radians(hue)
    lab = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], -1)
    return (lab @ _LAB_INVERSE.T) ** 3 @ _LMS_INVERSE.T


def _names(lightness: Array, chroma: Array, hue: Array) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Each colour name with the pixels that have it; every pixel has at most one, those between names have none."""
    # Some sets draw their greys with a purple tint.
    tint = np.where((hue > 270) & (hue < 335), 1.5, 1.0)
    grey = chroma < tint * np.where(lightness > 0.85, 0.03, 0.045)
    dark = ~grey & (lightness < 0.3)
    yield "black", (grey & (lightness < 0.42)) | dark
    yield "white", grey & (lightness > 0.9)
    yield "gray", grey & (lightness >= 0.42) & (lightness <= 0.9)
    vivid = ~grey & ~dark
    warm = vivid & ((hue > 12) & (hue < 105))
    pink = vivid & (((hue > 325) | (hue < 12)) & (lightness > 0.62) | (hue < 25) & (lightness > 0.68))
    rust = (lightness < 0.63) & ((hue > 42) | (hue > 30) & (chroma < 0.15))
    brown = warm & ~pink & (rust | (chroma < 0.115) & (lightness < 0.74))
    rest = warm & ~pink & ~brown
    yield "pink", pink
    yield "brown", brown
    yield "red", (rest & (hue < 37)) | (vivid & ~pink & ((hue > 350) | (hue <= 12)))
    yield "orange", rest & (hue >= 37) & (hue < 76) & (chroma > 0.1)
    yield "yellow", rest & (hue >= 76) & (chroma > 0.09)
    yield "green", vivid & (hue >= 112) & (hue < 180)
    yield "blue", vivid & (hue >= 205) & (hue < 287)
    yield "purple", vivid & ~pink & (hue >= 287) & (hue <= 345)


def shares(rgba: NDArray[np.uint8]) -> dict[str, float]:
    """The share of each colour name among the opaque pixels of an (H, W, 4) drawing."""
    opaque = rgba[..., 3] > 128
    if not opaque.any():
        return dict.fromkeys(COLOURS, 0.0)
    oklch = to_oklch(rgba[opaque][:, :3] / 255.0)
    return {name: float(mask.mean()) for name, mask in _names(*oklch)}


def colour_name(rgba: NDArray[np.uint8], least: float = 0.45) -> str | None:
    """The one colour that a person would name, or None when no colour clearly dominates the (H, W, 4) drawing.

    Greys are what wheels, windows and outlines have: beside a vivid colour they count for less.
    """
    parts = shares(rgba)
    vivid = 1 - parts["gray"] - parts["black"] - parts["white"]
    for grey in ("gray", "black", "white"):
        if parts[grey] >= 0.7 and vivid < 0.2:
            return grey
        parts[grey] *= 0.5
    total = sum(parts.values()) or 1.0
    first, second = sorted(parts, key=lambda name: parts[name], reverse=True)[:2]
    clear = parts[first] / total >= least and parts[first] >= 2 * parts[second]
    return first if clear and parts[first] > 0.25 and first not in ("gray", "black", "white") else None


@dataclass(frozen=True)
class Pixels:
    """The N drawn pixels of an (H, W, 4) drawing: where they are (H, W), which are opaque, their OKLCH, each (N,)."""

    drawn: NDArray[np.bool_]
    opaque: NDArray[np.bool_]
    lightness: Array
    chroma: Array
    hue: Array


def measure(rgba: NDArray[np.uint8]) -> Pixels:
    """The pixels of an (H, W, 4) drawing, to be turned to several colours."""
    drawn = rgba[..., 3] > 0
    return Pixels(drawn, rgba[drawn][:, 3] > 128, *to_oklch(rgba[drawn][:, :3] / 255.0))


def main_hue(pixels: Pixels, window: float = 35.0) -> tuple[float, float, float] | None:
    """(L, C, hue) of the saturated colour that a drawing is made of; None when there is no such colour.

    It must hold at least two thirds of the saturated pixels and a third of all.
    """
    opaque = pixels.opaque
    if not opaque.any():
        return None
    lightness, chroma, hue = pixels.lightness[opaque], pixels.chroma[opaque], pixels.hue[opaque]
    vivid = chroma > 0.06
    if vivid.mean() < 0.33:
        return None
    counts = np.histogram(hue[vivid], bins=72, range=(0, 360), weights=chroma[vivid])[0]
    peak = 2.5 + 5.0 * int(np.argmax(sum(np.roll(counts, step) for step in range(-3, 4))))
    near = vivid & (_distance(hue, peak) < window)
    if near.sum() < 0.66 * vivid.sum() or near.mean() < 0.33:
        return None
    angle = np.radians(hue[near])
    mean = np.degrees(np.arctan2(np.sin(angle).mean(), np.cos(angle).mean())) % 360
    return float(np.median(lightness[near])), float(np.median(chroma[near])), float(mean)


def turn(rgba: NDArray[np.uint8], colour: str, pixels: Pixels | None = None) -> NDArray[np.uint8] | None:
    """The (H, W, 4) drawing with its main colour turned to `colour`, a key of `TARGETS`; None if it has none.

    Shading is kept; pixels of other hues, greys, white and black stay as they are. A drawing that is nearly all grey or
    black is tinted instead. `pixels` is what `measure` says of the drawing, if that is known already.
    """
    pixels = pixels or measure(rgba)
    found = main_hue(pixels)
    turned = _tint(pixels, colour) if found is None else _turn(pixels, colour, found)
    if turned is None:
        return None
    part, some, colours = turned
    result = rgba.copy()
    values = result[pixels.drawn]
    share = part[some, None]
    mixed = share * colours * 255 + (1 - share) * values[some, :3]
    values[some, :3] = mixed.round().clip(0, 255).astype(np.uint8)
    result[pixels.drawn] = values
    return result


Turned = tuple[Array, NDArray[np.bool_], Array]  # how much of each pixel changes (N,), which (N,), to what sRGB (M, 3)


def _turn(pixels: Pixels, colour: str, found: tuple[float, float, float], window: float = 35.0) -> Turned:
    """Pixels within `window` of the main hue change."""
    (main_l, main_c, main_h), (target_l, target_c, target_h) = found, TARGETS[colour]
    # 1 within the window, falling to 0 at one and a half times its width.
    inside = np.clip(3 - 2 * _distance(pixels.hue, main_h) / window, 0, 1)
    some = inside > 0
    lightness, chroma, hue = pixels.lightness[some], pixels.chroma[some], pixels.hue[some]
    # Nearly grey pixels (highlights, edges to white) keep their lightness.
    part = inside[some] * np.clip(chroma / main_c, 0, 1) ** 0.5
    offset = (hue - main_h + 180) % 360 - 180
    turned_l = np.clip(lightness + part * (target_l - main_l), 0, 1)
    return inside, some, to_rgb(turned_l, chroma * target_c / main_c, target_h + 0.3 * offset)


def _tint(pixels: Pixels, colour: str, reach: float = 0.3) -> Turned | None:
    """For a drawing of one grey, or black; None for others. What is lighter or darker by `reach` stays."""
    grey = (pixels.chroma < 0.055) & (pixels.lightness < 0.92)
    known = grey & pixels.opaque
    if not known.any() or known.sum() < 0.6 * pixels.opaque.sum():
        return None
    main = float(np.median(pixels.lightness[known]))
    target_l, target_c, target_h = TARGETS[colour]
    # 1 near the main lightness, falling to 0 at `reach` from it.
    part = np.where(grey, np.clip(2 - 2 * np.abs(pixels.lightness - main) / reach, 0, 1), 0.0)
    some = part > 0
    tinted_l = np.clip(pixels.lightness[some] + target_l - main, 0, 1)
    return part, some, to_rgb(tinted_l, np.full_like(tinted_l, target_c), np.full_like(tinted_l, target_h))


def _distance(hue: Array, other: float) -> Array:
    return np.abs((hue - other + 180) % 360 - 180)
