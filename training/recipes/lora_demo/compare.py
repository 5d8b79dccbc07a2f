"""The same prompts and seed before and after fine-tuning, in rows by turns: before above, after below.

python -m latentdiff.training.recipes.lora_demo.compare runs/sticker docs/lora.png
"""

import sys
from pathlib import Path

from PIL import Image

from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.training.recipes.lora_demo.draw import STYLE

# None of them is in the pictures trained on, though things of some of their kinds are.
THINGS = [
    *(
        "a cat face",
        "a dog face",
        "a purple house",
        "a green car",
        "a slice of pizza",
        "a smiling face",
        "a blue heart",
    ),
    *("a strawberry", "a cup of coffee", "a yellow car", "a red umbrella", "a green fish", "a crown", "a banana"),
]
COLUMNS = 7


def draw(model: str | None) -> list[Image.Image]:
    pipeline = TextToImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline([f"{thing}, {STYLE}" for thing in THINGS], seed=0, return_dict=False)
    return list(output[0])


def main(model: str, file: Path) -> None:
    before, after = draw(None), draw(model)
    rows = [images[i : i + COLUMNS] for i in range(0, len(THINGS), COLUMNS) for images in (before, after)]
    save_picture(image_grid([image for row in rows for image in row], COLUMNS), file)
    print(file)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
