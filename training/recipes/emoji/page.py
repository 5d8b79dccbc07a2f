"""Pages of pictures with their prompts below, and tables of figures, for people to look at."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.png import save_picture

from .measures import Figure

SIDE, GAP, LABEL = 128, 8, 30  # pixels of a picture, between two, and for what is written below
COLUMNS = 5


def labelled(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """The pictures in rows, each with its label below in at most two lines.

    Raises:
        ValueError: not one label for each picture, or no pictures.
    """
    if len(pictures) != len(labels) or not pictures:
        raise ValueError(f"{len(pictures)} pictures with {len(labels)} labels make no page")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + LABEL + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = GAP + number % columns * (SIDE + GAP)
        top = GAP + number // columns * (SIDE + LABEL + GAP)
        page.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        pen.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline="#dddddd")
        lines = textwrap.wrap(label, 23)[:2]
        for line, text in enumerate(lines):
            pen.text((left + SIDE / 2, top + SIDE + 8 + 13 * line), text, fill="#333333", font=font, anchor="mm")
    return page


def write_page(
    pictures: Sequence[Image.Image], labels: Sequence[str], folder: Path, about: str, each: int = 20
) -> list[Path]:
    """`page.md` and its pictures `page-1.png` and so on, `each` in one; returns the paths of the pictures."""
    files = []
    for start in range(0, len(pictures), each):
        file = folder / f"page-{start // each + 1}.png"
        save_picture(labelled(pictures[start : start + each], labels[start : start + each]), file)
        files.append(file)
    shown = "\n\n".join(
        f"![{'; '.join(labels[i * each : (i + 1) * each])}]({file.name})" for i, file in enumerate(files)
    )
    text = f"# {len(pictures)} prompts, unselected\n\n{about}\n\n{shown}\n"
    write_text_whole(folder / "page.md", text)
    return files


def table(titles: Mapping[str, str], ceiling: Mapping[str, Figure], columns: Mapping[str, Mapping[str, Figure]]) -> str:
    """Markdown: a row for each of `titles` (by the figure's name), the ceiling, and a column for each of `columns`.

    A cell is the figure with its standard error, and the share of the ceiling.
    """
    named = [name for name in titles if name in ceiling or any(name in found for found in columns.values())]
    counts = {name: next(found[name].count for found in columns.values() if name in found) for name in named}
    lines = [f"| measure | pictures | {' | '.join(columns)} | ceiling |", f"|{'---|' * (len(columns) + 3)}"]
    for name in named:
        cells = [cell(found.get(name), ceiling.get(name)) for found in columns.values()]
        lines.append(f"| {titles[name]} | {counts[name]} | {' | '.join(cells)} | {cell(ceiling.get(name), None)} |")
    return "\n".join(lines) + "\n"


def cell(figure: Figure | None, ceiling: Figure | None) -> str:
    if figure is None:
        return ""
    text = f"{100 * figure.value:.1f} ± {100 * figure.error:.1f} %"
    part = figure.over(ceiling) if ceiling else None
    return f"{text} ({100 * part.value:.0f} %)" if part else text
