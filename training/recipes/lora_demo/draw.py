"""Twenty pictures in one style: flat colours, a thick white edge, on blue. Each has its caption.

python -m latentdiff.training.recipes.lora_demo.draw pictures
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIDE, SCALE = 256, 4  # pixels of a picture; shapes.txt has them on a grid of 64, SIDE / SCALE
GROUND, EDGE = "#1f5fbf", "#ffffff"
STYLE = "sticker"


def read_shapes() -> dict[str, list[str]]:
    """Captions and their shapes, from ``shapes.txt``, which says how they are written."""
    lines = Path(__file__).with_name("shapes.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(": ", 1) for line in lines if not line.startswith("#"))
    return {caption: shapes.split("; ") for caption, shapes in pairs}


def figure_of(shapes: list[str]) -> Image.Image:
    """Shapes on a transparent ground."""
    figure = Image.new("RGBA", (SIDE, SIDE))
    draw = ImageDraw.Draw(figure)
    for shape in shapes:
        colour, kind, *rest = shape.split()
        points = [tuple(SCALE * int(number) for number in point.split(",")) for point in rest]
        box = (*points[0], *points[1])
        if kind == "E":
            draw.ellipse(box, colour)
        elif kind == "S":
            start, end = (int(angle) for angle in rest[2].split(","))
            draw.pieslice(box, start, end, colour)
        elif kind == "P":
            draw.polygon(points, colour)
        else:
            draw.line(points, colour, 3 * SCALE)
    return figure


def sticker(shapes: list[str]) -> Image.Image:
    """Shapes with a white edge around them, on blue."""
    figure = figure_of(shapes)
    picture = Image.new("RGB", (SIDE, SIDE), GROUND)
    outline = figure.getchannel("A").filter(ImageFilter.MaxFilter(6 * SCALE + 1))
    picture.paste(EDGE, mask=outline.filter(ImageFilter.GaussianBlur(1)))
    picture.paste(figure, mask=figure)
    return picture


def main(folder: Path) -> None:
    """Draw into `folder`, with a ``metadata.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for caption, shapes in read_shapes().items():
        name = caption.split(" ", 1)[1].replace(" ", "-") + ".png"
        sticker(shapes).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": f"{caption}, {STYLE}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} pictures in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
