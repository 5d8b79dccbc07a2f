"""DreamBooth (Ruiz et al. 2023): a subject under a rare word, beside pictures of its class drawn by the model itself.

The class pictures keep the model from forgetting what the class looks like otherwise (Sec. 4.3, Eq. 2).
"""

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff import __version__
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.pipelines.distributed import processes
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.drawings import Drawing, draw, missing
from latentdiff.training.loop.estimate import FEW, duration
from latentdiff.training.settings import FinetuneSettings

logger = logging.getLogger(__name__)

BATCH = 8  # pictures drawn at once; each has its own seed


def settings_of(settings: FinetuneSettings, number: int) -> dict[str, Any]:
    """How class picture `number` is drawn."""
    return {
        "prompts": [settings.class_prompt],
        "count": 1,
        "seed": settings.seed + number,
        "negative_prompt": None,
        "num_inference_steps": settings.sample_steps,
        "guidance_scale": settings.sample_guidance_scale,
        "model": settings.model,
        "width": settings.resolution,
        "height": settings.resolution,
    }


def drawings_in(folder: Path, settings: FinetuneSettings) -> list[Drawing]:
    """All class pictures, as they are or will be in `folder`."""
    numbers = range(settings.class_pictures)
    return [Drawing(folder / f"{number:05d}.png", settings_of(settings, number)) for number in numbers]


def draw_class_pictures(settings: FinetuneSettings, pipeline: TextToImagePipeline) -> list[CaptionedPicture]:
    """Pictures of the class, in ``training/class_pictures``; those that are there already are not drawn again.

    Each process draws its share. `pipeline` is the model before any training, on the process's device.

    Raises:
        FileExistsError: a file that latentdiff did not draw has the name of one of them.
    """
    state = processes()
    folder = Path(settings.output) / "training" / "class_pictures"
    drawings = drawings_in(folder, settings)
    absent = missing(drawings)
    needed = len(absent)
    if settings.is_dry_run:
        absent = drawings = drawings_in(settings.folder, settings)[:FEW]
    state.wait_for_everyone()  # all have looked before any draws
    if absent and state.is_main_process:
        logger.info("drawing %d pictures of %r into %s", len(absent), settings.class_prompt, folder)

    def output_of(batch: Sequence[Drawing]) -> Any:
        return pipeline(
            [str(settings.class_prompt)] * len(batch),
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=settings.sample_steps,
            guidance_scale=settings.sample_guidance_scale,
            seed=[drawing.settings["seed"] for drawing in batch],
        )

    kept = {"scheduler": type(pipeline.scheduler).__name__, "precision": "float32", "version": __version__}
    began = time.monotonic()
    draw(absent[state.process_index :: state.num_processes], output_of, BATCH, kept, "class pictures")
    state.wait_for_everyone()
    if settings.is_dry_run:
        seconds = (time.monotonic() - began) * needed / len(drawings)
        logger.info("drawing %d class pictures, before all else, takes about %s", needed, duration(seconds))
    return [class_picture(drawing.file, settings) for drawing in drawings]


def class_picture(file: Path, settings: FinetuneSettings) -> CaptionedPicture:
    side = settings.resolution
    return CaptionedPicture(
        name=str(file),
        read=functools.partial(Path.read_bytes, file),
        captions=(str(settings.class_prompt),),
        loss_weight=settings.prior_loss_weight,
        digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        size=(side, side),
    )


def mix(instances: Sequence[CaptionedPicture], priors: Sequence[CaptionedPicture]) -> list[CaptionedPicture]:
    """Both together, weighted so that training uses equally many of each."""
    share = sum(picture.weight for picture in instances) / len(priors)
    return [*instances, *(dataclasses.replace(prior, weight=share) for prior in priors)]


def of_subject(pictures: Sequence[CaptionedPicture], caption: str) -> list[CaptionedPicture]:
    """`pictures`, all under the subject's caption."""
    return [dataclasses.replace(picture, captions=(caption,)) for picture in pictures]
