"""Small captioned pictures to train on."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def save_discs(folder: Path, **column: str) -> Path:
    """Twelve discs on white with metadata.jsonl, the last two of them for validation.

    column: a further column with the colour, as ``colour="{}"``.
    """
    folder.mkdir()
    rows = []
    for i in range(12):
        colour = COLOURS[i % len(COLOURS)]
        image = Image.new("RGB", (20 + i, 16), "white")
        ImageDraw.Draw(image).ellipse((4, 2, 16 + i % 3, 13), fill=colour)
        image.save(folder / f"{i}.png")
        split = "validation" if i >= 10 else "train"
        more = {name: value.format(colour) for name, value in column.items()}
        rows.append({"file_name": f"{i}.png", "text": [f"a {colour} thing", colour], "split": split, **more})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def add_masks(folder: Path) -> None:
    """Lay a mask beside each picture of `save_discs`: white where the disc is, and grey around it."""
    for i in range(12):
        mask = Image.new("L", (20 + i, 16), 0)
        ImageDraw.Draw(mask).ellipse((4, 2, 16 + i % 3, 13), fill=255, outline=128)
        mask.save(folder / f"{i}.mask.png")
