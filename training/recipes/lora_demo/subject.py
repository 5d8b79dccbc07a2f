"""Five pictures of one subject, a teal cat with a yellow ear: turned, larger and smaller, on several grounds.

python -m latentdiff.training.recipes.lora_demo.subject my-cat
"""

import sys
from pathlib import Path

from PIL import Image

from latentdiff.training.recipes.lora_demo.draw import SIDE, figure_of

CAT = [
    *("#1fa3a3 P 9,30 12,5 30,15", "#f5c531 P 55,30 52,5 34,15", "#f7a1b5 P 13,22 15,11 23,16"),
    *(
        "#1fa3a3 E 7,11 57,58",
        "#0d6d74 P 28,12 36,12 32,25",
        "#0d6d74 P 18,15 24,13 24,22",
        "#0d6d74 P 40,13 46,15 40,22",
    ),
    *("#ffffff E 15,25 29,40", "#ffffff E 35,25 49,40", "#222222 E 20,29 27,38", "#222222 E 37,29 44,38"),
    *("#f2607d P 28,41 36,41 32,46", "#0d6d74 L 32,46 25,51", "#0d6d74 L 32,46 39,51", "#f5c531 E 26,53 38,62"),
]
"""As in ``shapes.txt``."""
PLACES = [
    *(("#ffffff", 0, 1.0), ("#ffffff", 14, 0.85), ("#f3e3c3", -10, 0.95), ("#cfe8f7", 6, 0.7)),
    ("#ffffff", -20, 0.8),
]
"""Of each picture the ground, the turn in degrees and the size."""

PROMPTS = [
    *("a sks cat face", "a sks cat face on a yellow background", "a small sks cat face", "two sks cat faces"),
    *("a sks cat face next to a slice of pizza", "a sks cat face next to a red car", "a cat face"),
]
"""What it is asked for afterwards; the last one is to be as before."""


def main(folder: Path) -> None:
    """Draw into `folder`; captions are not needed, for the subject's is given to ``latentdiff finetune``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (ground, angle, size) in enumerate(PLACES, start=1):
        turned = figure_of(CAT).rotate(angle, Image.Resampling.BICUBIC)
        small = turned.resize((round(SIDE * size),) * 2, Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (SIDE, SIDE), ground)
        picture.paste(small, ((SIDE - small.width) // 2,) * 2, mask=small)
        picture.save(folder / f"{number}.png")
    print(f"{len(PLACES)} pictures in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
