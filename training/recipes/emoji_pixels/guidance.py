"""How much guidance raises the share of drawings that are what they were asked to be, by a judge who is not the guide.

python -m latentdiff.training.recipes.emoji_pixels.guidance runs/guided --unconditional runs/unconditional \\
    --data runs/emoji/data --output runs/guidance
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentdiff import ClassConditionalPipeline
from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.metrics import kernel_distance
from latentdiff.metrics.extractors import load_extractor
from latentdiff.metrics.pixels import pictures_to_pixels
from latentdiff.training.data import load_pictures
from latentdiff.training.evaluation.evaluate import Measured
from latentdiff.training.evaluation.held_out import load_textless
from latentdiff.training.recipes.emoji_pixels.judge import load_or_train, tensors

STEPS = 25


@dataclass(frozen=True)
class Way:
    """How to draw: with a UNet that is told the class or not, and how strongly guided by what."""

    told: bool
    classifier_scale: float = 0.0
    guidance_scale: float = 1.0

    def __str__(self) -> str:
        who = "class-conditional" if self.told else "unconditional"
        return f"{who} | {self.classifier_scale:g} | {self.guidance_scale:g}"


WAYS = (
    *(Way(told, scale) for told in (False, True) for scale in (0.0, 1.0, 3.0, 10.0)),
    *(Way(True, 0.0, scale) for scale in (2.0, 4.0)),
    Way(True, 1.0, 2.0),
)
SHOWN = (Way(False), Way(False, 10.0), Way(True), Way(True, 3.0), Way(True, 0.0, 4.0))


def drawn(pipeline: ClassConditionalPipeline, way: Way, count: int) -> list[Image.Image]:
    """`count` pictures of each class in turn; the same noise for every way."""
    images: list[Image.Image] = []
    for number in range(pipeline.num_classes):
        images += pipeline(
            number,
            num_images_per_class=count,
            num_inference_steps=STEPS,
            classifier_scale=way.classifier_scale,
            guidance_scale=way.guidance_scale,
            seed=1000 * number,
            return_dict=False,
        )[0]
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guided", help="folder of the class-conditional model with its classifier")
    parser.add_argument("--unconditional", required=True, help="folder of the unconditional model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--column", default="group", help="of the table, with the class")
    parser.add_argument("--output", type=Path, required=True, help="folder for judge, table and grid")
    parser.add_argument("--count", type=int, default=20, help="pictures of each class, for each row of the table")
    options = parser.parse_args()
    told, untold = load_textless(options.guided), load_textless(options.unconditional)
    assert isinstance(told, ClassConditionalPipeline)
    assert told.id2label is not None
    classes = [told.id2label[i] for i in range(told.num_classes)]
    pipelines = {
        True: told,
        False: ClassConditionalPipeline(untold.unet, untold.scheduler, None, told.classifier, told.id2label),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    side = told.picture_size(None, None)[0]
    judge = load_or_train(options.output / "judge.safetensors", options.data, classes, options.column, side)
    held_out = load_pictures(options.data, "validation", caption_column=options.column, condition="class")
    real, labels = tensors(held_out, classes, side)
    extractor = load_extractor("autoencoder")
    features = extractor.features(Measured(held_out, [], side, side).real(), 32)
    of_real = (judge.answers(real) == labels).float().mean().item()
    table: list[dict[str, Any]] = []
    print(f"the judge is right about {of_real:.1%} of {len(real)} held-out pictures", flush=True)
    asked = torch.arange(len(classes)).repeat_interleave(options.count)
    grid: list[Image.Image] = []
    for way in WAYS:
        pipeline = pipelines[way.told]
        pipeline.set_progress_bar_config(disable=True)
        images = drawn(pipeline, way, options.count)
        right = (judge.answers(pictures_to_pixels(images)) == asked).float()
        distance = kernel_distance(extractor.features(iter(images), 32), features).mean
        accuracy = right.mean().item()
        by_class = dict(zip(classes, right.view(len(classes), -1).mean(1).tolist(), strict=True))
        table.append({"way": str(way), "accuracy": accuracy, "kernel_distance": distance, "by_class": by_class})
        print(f"| {way} | {accuracy:.1%} | {distance:.3g} |", flush=True)
        save_picture(image_grid(images, options.count), options.output / f"{len(table):02d}.png")
        if way in SHOWN:
            grid += images[:: options.count] + images[1 :: options.count]  # the first two of every class
    report = {"pictures_per_row": len(asked), "judge_on_real_pictures": of_real, "steps": STEPS, "rows": table}
    write_text_whole(options.output / "guidance.json", json.dumps(report, indent=2) + "\n", sync=True)
    whole = image_grid(grid, len(classes))
    whole = whole.resize((whole.width * 2, whole.height * 2), Image.Resampling.NEAREST)
    save_picture(whole, options.output / "grid.png")


if __name__ == "__main__":
    main()
