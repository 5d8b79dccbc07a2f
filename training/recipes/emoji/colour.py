"""Colour names for drawings, and drawings in other colours, in OKLCH (Björn Ottosson 2020).

Lightness L is in 0..1, chroma C in 0..about 0.35, hue in degrees.
"""

from collections.abc import Iterator

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
}
COLOURS = (*TARGETS, "brown", "black", "white", "gray")


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
    for _ in range(40):
        outside = ((linear < -1e-3) | (linear > 1 + 1e-3)).any(-1)
        if not outside.any():
            break
        chroma[outside] *= 0.93
        linear[outside] = _to_linear(lightness[outside], chroma[outside], hue[outside])
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


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
    brown = warm & ~pink & ((lightness < 0.62) & (hue > 42) | (chroma < 0.115) & (lightness < 0.74))
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


def main_hue(rgba: NDArray[np.uint8], window: float = 35.0) -> tuple[float, float, float] | None:
    """(L, C, hue) of the saturated colour that an (H, W, 4) drawing is made of; None when there is no such colour.

    It must hold at least two thirds of the saturated pixels and a third of all.
    """
    opaque = rgba[..., 3] > 128
    if not opaque.any():
        return None
    lightness, chroma, hue = to_oklch(rgba[opaque][:, :3] / 255.0)
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


def turn(rgba: NDArray[np.uint8], colour: str, window: float = 35.0) -> NDArray[np.uint8] | None:
    """The (H, W, 4) drawing with its main colour turned to `colour`, a key of `TARGETS`; None if it has none.

    Shading is kept; pixels of other hues, greys, white and black stay as they are.
    """
    found = main_hue(rgba, window)
    if found is None:
        return None
    (main_l, main_c, main_h), (target_l, target_c, target_h) = found, TARGETS[colour]
    lightness, chroma, hue = to_oklch(rgba[..., :3] / 255.0)
    # 1 within the window, falling to 0 at one and a half times its width.
    inside = np.clip(3 - 2 * _distance(hue, main_h) / window, 0, 1)
    mask = (inside > 0) & (rgba[..., 3] > 0)
    inside, lightness, chroma, hue = inside[mask], lightness[mask], chroma[mask], hue[mask]
    # Nearly grey pixels (highlights, edges to white) keep their lightness.
    part = inside * np.clip(chroma / main_c, 0, 1) ** 0.5
    offset = (hue - main_h + 180) % 360 - 180
    turned_l = np.clip(lightness + part * (target_l - main_l), 0, 1)
    colours = to_rgb(turned_l, chroma * target_c / main_c, target_h + 0.3 * offset)
    turned = rgba.copy()
    mixed = inside[:, None] * colours * 255 + (1 - inside[:, None]) * rgba[mask][:, :3]
    turned[mask, :3] = mixed.round().clip(0, 255).astype(np.uint8)
    return turned


def _distance(hue: Array, other: float) -> Array:
    return np.abs((hue - other + 180) % 360 - 180)
