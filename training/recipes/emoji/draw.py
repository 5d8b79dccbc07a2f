"""SVG bodies to pictures, with resvg: the drawing centred and of one size, on white."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .icons import Icon

Rgba = NDArray[np.uint8]

PROBE = 64  # pixels of the small drawing that tells where the ink is
MAX_ZOOM = 1.3  # small drawings stay somewhat smaller than the others


def render(icon: Icon, size: int = 128, fill: float = 0.92) -> Rgba:
    """`icon` as (size, size, 4) RGBA, straight alpha; its ink is centred and its longer side `fill` of the picture.

    Raises `ValueError` when the SVG cannot be drawn or draws nothing.
    """
    left, top, width, height = icon.box
    side = max(width, height)
    centre = (left + width / 2, top + height / 2)
    ink = _render(icon.body, centre, side, PROBE)[..., 3] > 16
    if not ink.any():
        raise ValueError("the SVG draws nothing")
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    unit = side / PROBE
    longer = (max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1) * unit
    centre = (
        centre[0] + ((columns[0] + columns[-1] + 1) - PROBE) / 2 * unit,
        centre[1] + ((rows[0] + rows[-1] + 1) - PROBE) / 2 * unit,
    )
    return _render(icon.body, centre, max(longer, side / MAX_ZOOM) / fill, size)


def _render(body: str, centre: tuple[float, float], side: float, size: int) -> Rgba:
    import resvg_py

    box = f"{centre[0] - side / 2:g} {centre[1] - side / 2:g} {side:g} {side:g}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{box}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def on_white(rgba: Rgba) -> Image.Image:
    """(H, W, 4) RGBA as an RGB picture on a white background."""
    picture = Image.fromarray(rgba, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
