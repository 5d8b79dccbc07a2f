"""What a run shows to people: the curves of its figures, and samples with their captions below."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from latentdiff.interchange.png import image_grid
from latentdiff.training.loop.lettering import lettering

CURVES = {
    "loss": "training loss",
    "val_loss": "held-out loss",
    "psnr": "PSNR of reconstructions, dB",
    "learning_rate": "learning rate",
}
"""The figures that are drawn, where a run has them."""
WIDTH, HEIGHT, MARGINS = 880, 560, (130, 60, 850, 500)  # of a panel before it is halved: left, top, right, bottom
TICKS = 5
LEAST = 64  # the least longer side of a picture on a sheet; smaller ones are enlarged
CELL, LINES, LINE = 128, 3, 13  # the least width of a labelled picture; lines of a label, and the height of one


def curves(rows: Sequence[Mapping[str, Any]], weighted: str = "") -> Image.Image | None:
    """A panel for each of `CURVES` that the rows of figures by ``step`` have; None: they have none.

    weighted: by what the training loss is and the held-out loss is not, so that the two are not compared.
    """
    panels = []
    for name, title in CURVES.items():
        found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        points = [(step, value) for step, value in found if math.isfinite(value)]
        if points:
            named = f"{title}, weighted by {weighted}," if weighted and name == "loss" else title
            panels.append(panel(named, points, in_steps=name == "learning_rate"))
    return image_grid(panels, 2) if panels else None


def panel(title: str, points: Sequence[tuple[float, float]], in_steps: bool = False) -> Image.Image:
    """One curve through (step, value), in the order of their steps.

    in_steps: a value holds until the next one, rather than the curve sloping to it.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=22)
    left, top, right, bottom = MARGINS
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    values = [value for _, value in points]
    low = min(values)
    high = max(values) if max(values) > low else low + (abs(low) or 1.0)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step - first) / (last - first)
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    for share in (i / (TICKS - 1) for i in range(TICKS)):
        step, value = round(first + (last - first) * share), low + (high - low) * share
        x, y = place(step, value)
        pen.line([(left, y), (right, y)], "#dddddd", 2)
        pen.text((left - 12, y), f"{value:.3g}", "black", font, "rm")
        pen.text((x, bottom + 12), str(step), "black", font, "mt")
    pen.text(((left + right) / 2, top / 2), f"{title} by step", "black", font, "mm")
    places = [place(*point) for point in points]
    corners = [corner for (x, y), after in pairwise(places) for corner in ((x, y), (after[0], y))] + places[-1:]
    pen.line(corners if in_steps else places, "#1f77b4", 4, "curve")
    for x, y in places if len(places) < 40 else places[-1:]:
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), "#1f77b4")
    return image.reduce(2)


def comparison_sheet(
    rows: Mapping[str, Sequence[Image.Image | None]], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Pictures of the same captions below each other, as often as `columns` of them need it.

    Args:
        rows: by name, which stands at the left if there are several; each has a picture or None for every caption.
        captions: below the last row, cut off after `LINES` lines.
    """
    sizes = [image.size for row in rows.values() for image in row if image is not None]
    times = math.ceil(LEAST / max(map(max, sizes)))
    if times > 1:
        large = {name: [image and enlarged(image, times) for image in row] for name, row in rows.items()}
        return comparison_sheet(large, captions, columns)
    width, height = max(CELL, *(size[0] for size in sizes)), max(size[1] for size in sizes)
    cells: list[Image.Image] = []
    for start in range(0, len(captions), columns):
        if len(rows) > 1:
            cells.append(cell([named(name, width, height) for name in rows], "", width))
        for i in range(start, min(start + columns, len(captions))):
            images = [row[i] or Image.new("RGB", (width, height), "#eeeeee") for row in rows.values()]
            cells.append(cell(images, captions[i], width))
    return image_grid(cells, columns + (len(rows) > 1))


def enlarged(image: Image.Image, times: int) -> Image.Image:
    """`image` with each pixel a square of `times` x `times`."""
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def cell(images: Sequence[Image.Image], caption: str, width: int) -> Image.Image:
    """`images` below each other on white, and below them the caption."""
    height = sum(image.height for image in images)
    whole = Image.new("RGB", (width, height + LINES * LINE + 4), "white")
    top = 0
    for image in images:
        whole.paste(image, ((width - image.width) // 2, top))
        top += image.height
    pen = ImageDraw.Draw(whole)
    text, font = lettering(caption, 11)
    letter = max(6.0, font.getlength(text) / max(1, len(text)))  # Chinese ones are wider
    lines = textwrap.wrap(text, int(width // letter), max_lines=LINES, placeholder=" ...")
    for i, line in enumerate(lines):
        pen.text((width / 2, height + 2 + i * LINE), line, "black", font, "ma")
    return whole


def named(name: str, width: int, height: int) -> Image.Image:
    """The name of a row, in the place of a picture."""
    image = Image.new("RGB", (width, height), "white")
    text, font = lettering(name, 13)
    ImageDraw.Draw(image).text((width - 8, height / 2), text, "black", font, "rm")
    return image
