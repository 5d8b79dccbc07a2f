"""What the emoji model can do: the grid of twenty prompts, and how often a colour that is asked for is drawn.

    python -m latentdiff.training.recipes.emoji.evaluate MODEL OUT

Writes `OUT/grid.png` (the prompts of `denoiser.yaml`, seed 0), `OUT/colours.png` and `OUT/evaluation.json`.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.pipelines import TextToImagePipeline

from .colour import colour_name

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
THINGS = ("car", "apple", "fish", "heart", "flower", "umbrella", "house", "book", "balloon", "shirt", "bird", "hat")


def read_prompts() -> list[str]:
    """The twenty prompts of the recipe."""
    settings = yaml.safe_load(files(__package__).joinpath("denoiser.yaml").read_text(encoding="utf-8"))
    return list(settings["sample_prompts"])


def with_alpha(image: Image.Image, white: int = 238) -> NDArray[np.uint8]:
    """(H, W, 4): the picture with its white background transparent, as `colour_name` wants it."""
    rgb = np.array(image.convert("RGB"))
    alpha = np.where(rgb.min(axis=-1) >= white, 0, 255).astype(np.uint8)
    return np.dstack([rgb, alpha])


def draw(pipeline: Any, prompts: Sequence[str], seed: int, batch: int = 12, **settings: Any) -> list[Image.Image]:
    """One picture a prompt; the picture of prompt number i has seed `seed + i`."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        images += pipeline(chunk, seed=[seed + start + i for i in range(len(chunk))], **settings).images
    return images


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evaluate", description="Draw and measure an emoji model.")
    parser.add_argument("model", help="pipeline folder, or the name of a packaged model")
    parser.add_argument("output", type=Path, help="folder for the grids and evaluation.json")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    options = parser.parse_args(arguments)

    pipeline = TextToImagePipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    save_picture(image_grid(draw(pipeline, read_prompts(), 0, **settings), 5), options.output / "grid.png")

    asked = [(colour, thing) for thing in THINGS for colour in COLOURS]
    prompts = [f"{'an' if colour == 'orange' else 'a'} {colour} {thing}" for colour, thing in asked]
    images = draw(pipeline, prompts, 0, **settings)
    save_picture(image_grid(images, len(COLOURS)), options.output / "colours.png")
    named = [colour_name(with_alpha(image)) for image in images]
    right = sum(name == colour for name, (colour, _) in zip(named, asked, strict=True))
    figures = {"colour_prompts": len(asked), "colour_right": right, **settings}
    (options.output / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"{right} of {len(asked)} prompts with a colour are drawn in it")


if __name__ == "__main__":
    main()
