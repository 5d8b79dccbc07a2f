"""A folder of small captioned pictures."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve discs on white with metadata.jsonl, the last two of them for validation."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(12):
        colour = COLOURS[i % len(COLOURS)]
        image = Image.new("RGB", (20 + i, 16), "white")
        ImageDraw.Draw(image).ellipse((4, 2, 16 + i % 3, 13), fill=colour)
        image.save(folder / f"{i}.png")
        split = "validation" if i >= 10 else "train"
        rows.append({"file_name": f"{i}.png", "text": [f"a {colour} thing", colour], "split": split})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder
