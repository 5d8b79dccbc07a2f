"""What of a picture is drawn and what is background, told from its pixels: boxes, pieces, colours, shading."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .colour import colour_name, shares, to_oklch

Mask = NDArray[np.bool_]
Box = tuple[int, int, int, int]  # left, top, right, bottom

SIDE = 128  # pictures of other sizes are resized, so that the rules below hold for all
NEAR = 0.04  # distance in OKLab up to which a pixel may be background
RING = 2  # pixels at the edge that are background unless most of them are not
SPECK = 0.0015  # of the picture, of a piece that is drawn, at least
LEAST = 0.006  # of the picture, of a piece that counts
PIECE = 0.3  # of the largest piece, of a piece that counts
SMALL, BIG = 0.5, 0.9  # longer sides of what is called so, at most and at least
EDGE = 0.02  # change of colour in OKLab, from pixel to pixel, that is an edge
SHADED = 0.2  # of the drawn pixels, of a glossy drawing, at least
COLOURLESS, INKED = 0.1, 0.5  # of what is not background's colour, of an outline drawing: vivid at most, black at least
GREYS = ("black", "white", "gray")


@dataclass(frozen=True)
class Ink:
    """A picture as RGB (H, W, 3) uint8, which of its pixels are drawn (H, W), and its background's colour (3,)."""

    rgb: NDArray[np.uint8]
    mask: Mask
    background: NDArray[np.uint8]

    def part(self, mask: Mask) -> "Ink":
        """The same picture with only those of its drawn pixels that are in `mask` too."""
        return Ink(self.rgb, self.mask & mask, self.background)


def find_ink(picture: Image.Image) -> Ink:
    """The background is what is joined to the edge and has the edge's median colour; all the rest is drawn."""
    rgb = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    edge = np.concatenate(
        [
            rgb[:RING].reshape(-1, 3),
            rgb[-RING:].reshape(-1, 3),
            rgb[:, :RING].reshape(-1, 3),
            rgb[:, -RING:].reshape(-1, 3),
        ]
    )
    background = np.median(edge, axis=0).astype(np.uint8)
    near = np.linalg.norm(lab(rgb) - lab(background), axis=-1) < NEAR
    labels = pieces(near)
    rim = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return Ink(rgb, without_specks(~(near & np.isin(labels, rim[rim > 0]))), background)


def without_specks(mask: Mask) -> Mask:
    """`mask` without pieces of a few pixels, such as networks leave in corners: they would spoil every box."""
    labels = pieces(mask)
    large = np.bincount(labels.ravel()) >= SPECK * mask.size
    large[0] = False
    return large[labels]


def lab(rgb: NDArray[np.uint8]) -> NDArray[np.floating]:
    """sRGB bytes (..., 3) to OKLab (..., 3)."""
    lightness, chroma, hue = to_oklch(rgb / 255.0)
    return np.stack([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))], -1)


def pieces(mask: Mask) -> NDArray[np.int32]:
    """(H, W) numbers above 0, the same for all pixels of one connected piece; 0 where `mask` is not."""
    from scipy import ndimage

    return ndimage.label(mask, np.ones((3, 3)))[0]


def count_pieces(ink: Ink) -> list[Mask]:
    """The pieces large enough to be things of their own, the largest first."""
    labels = pieces(ink.mask)
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    least = max(LEAST * ink.mask.size, PIECE * areas.max(initial=0))
    order = np.argsort(-areas, kind="stable")
    return [labels == numbers[i] for i in order if areas[i] >= least]


def box_of(mask: Mask) -> Box | None:
    """Around all pixels of `mask`; None where there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def crop(ink: Ink, margin: float = 0.06) -> Image.Image | None:
    """The box around the drawn pixels, made square with background, with a margin; None where nothing is drawn."""
    box = box_of(ink.mask)
    if box is None:
        return None
    left, top, right, bottom = box
    side = round(max(right - left, bottom - top) * (1 + 2 * margin))
    picture = Image.new("RGB", (side, side), tuple(int(value) for value in ink.background))
    picture.paste(
        Image.fromarray(ink.rgb[top:bottom, left:right]), ((side - (right - left)) // 2, (side - (bottom - top)) // 2)
    )
    return picture


def halves(ink: Ink, across: bool) -> tuple[Ink, Ink]:
    """Left and right part (`across`) or upper and lower, cut near the middle where the least is drawn."""
    profile = ink.mask.sum(0 if across else 1)
    low, high = round(0.3 * SIDE), round(0.7 * SIDE)
    places = np.arange(low, high + 1)
    cut = int(places[np.lexsort((abs(places - SIDE / 2), profile[low : high + 1]))[0]])
    first = np.zeros_like(ink.mask)
    first[(slice(None), slice(cut)) if across else (slice(cut),)] = True
    return ink.part(first), ink.part(~first)


def with_alpha(ink: Ink) -> NDArray[np.uint8]:
    """(H, W, 4): the background transparent, as `colour_name` wants it."""
    return np.dstack([ink.rgb, np.where(ink.mask, 255, 0).astype(np.uint8)])


def main_colour(ink: Ink) -> str | None:
    """The one colour that a person would name, by the rule that drawings turned to a colour are chosen by."""
    return colour_name(with_alpha(ink), 0.4)


def has_most(ink: Ink, colour: str) -> bool:
    """Whether no other colour has more of the drawn pixels; black, white and grey only count where one is asked for."""
    found = {name: share for name, share in shares(with_alpha(ink)).items() if colour in GREYS or name not in GREYS}
    return found[colour] > 0 and found[colour] == max(found.values())


def ground_colour(ink: Ink) -> str | None:
    """The name of the background's colour."""
    patch = np.full((1, 1, 4), 255, np.uint8)
    patch[0, 0, :3] = ink.background
    found: Sequence[str] = [name for name, share in shares(patch).items() if share]
    return found[0] if found else None


def longer_side(ink: Ink) -> float:
    """Of the box around all that is drawn, as a share of the picture's side; 0 where nothing is."""
    box = box_of(ink.mask)
    return 0.0 if box is None else max(box[2] - box[0], box[3] - box[1]) / SIDE


def is_outline(ink: Ink) -> bool:
    """Whether it is drawn in black alone, whatever shows between the lines."""
    seen = np.linalg.norm(lab(ink.rgb) - lab(ink.background), axis=-1) >= NEAR
    parts = shares(with_alpha(ink.part(seen)))
    return parts["black"] >= INKED and sum(parts[name] for name in parts if name not in GREYS) <= COLOURLESS


def shading(ink: Ink, least: float = 0.003) -> float:
    """The share of the drawn pixels, those near edges aside, where the colour changes from pixel to pixel."""
    from scipy import ndimage

    colours = np.stack([ndimage.gaussian_filter(channel, 1.0) for channel in np.moveaxis(lab(ink.rgb), -1, 0)], -1)
    step = np.hypot(*(np.linalg.norm(change, axis=-1) for change in np.gradient(colours, axis=(0, 1))))
    inner = ink.mask & ~ndimage.binary_dilation(step > EDGE, iterations=3)
    return float((step[inner] > least).mean()) if inner.any() else 0.0


def looks(ink: Ink) -> str:
    """`outline`, `glossy` or `flat`."""
    if is_outline(ink):
        return "outline"
    return "glossy" if shading(ink) > SHADED else "flat"
