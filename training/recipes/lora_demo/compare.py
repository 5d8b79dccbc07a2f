"""The same prompts and seed before and after fine-tuning, in rows by turns: before above, after below.

python -m latentdiff.training.recipes.lora_demo.compare runs/sticker docs/lora.png
python -m latentdiff.training.recipes.lora_demo.compare runs/cat docs/dreambooth.png subject
"""

import sys
from pathlib import Path

from PIL import Image

from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.training.recipes.lora_demo.draw import STYLE
from latentdiff.training.recipes.lora_demo.subject import PROMPTS

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


def draw(model: str | None, prompts: list[str]) -> list[Image.Image]:
    pipeline = TextToImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return list(pipeline(prompts, seed=0, return_dict=False)[0])


def main(model: str, file: Path, of_subject: bool = False) -> None:
    prompts = PROMPTS if of_subject else [f"{thing}, {STYLE}" for thing in THINGS]
    before, after = draw(None, prompts), draw(model, prompts)
    rows = [images[i : i + COLUMNS] for i in range(0, len(prompts), COLUMNS) for images in (before, after)]
    save_picture(image_grid([image for row in rows for image in row], COLUMNS), file)
    print(file)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["subject"])
