"""Pictures for fine-tuning and distillation: the user's, what a teacher draws, or captions alone."""

import hashlib
import json
import logging
import time
from dataclasses import replace
from typing import Any

from latentdiff import __version__
from latentdiff.interchange.atomic import write_text_whole
from latentdiff.pipelines import DiTPipeline
from latentdiff.pipelines.distributed import processes
from latentdiff.pipelines.tasks.class_conditional import class_number
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.load import hold_out
from latentdiff.training.drawings import Drawing, draw, missing
from latentdiff.training.loop.estimate import FEW, duration
from latentdiff.training.settings import AdaptedSettings, DistillationSettings
from latentdiff.training.trainers.diffusion import Data, load_data

logger = logging.getLogger(__name__)

BATCH = 8  # pictures drawn at once


def load_pictures(settings: AdaptedSettings, pipeline: Any) -> Data:
    """The pictures; of a model of classes see `with_class_names`.

    Raises:
        ValueError: see there, and `load_data`.
    """
    of_classes = isinstance(pipeline, DiTPipeline)
    return with_class_names(load_data(settings, "class"), pipeline) if of_classes else load_data(settings)


def with_class_names(data: Data, pipeline: DiTPipeline) -> Data:
    """Pictures with the names as captions that a model has for their classes.

    Raises:
        ValueError: a picture is of no class that the model knows.
    """
    names = classes_of(pipeline)

    def named(picture: CaptionedPicture) -> CaptionedPicture:
        try:
            number = class_number(picture.captions[0], pipeline.id2label or {}, pipeline.num_classes)
        except ValueError as error:
            raise ValueError(f"{picture.name}: {error}; a class that the model knows is needed") from None
        return replace(picture, captions=(names[number],))

    return replace(data, pictures=list(map(named, data.pictures)), held_out=list(map(named, data.held_out)))


def classes_of(pipeline: Any) -> list[str]:
    """The names of a model's classes, or else their numbers."""
    names = pipeline.id2label or {}
    return [names.get(number, str(number)) for number in range(pipeline.num_classes)]


def with_drawings(settings: DistillationSettings, pipeline: Any, prompts: list[str]) -> DistillationSettings:
    """With `prompts`, settings whose data are pictures that the teacher has drawn of them; else the same.

    They are in ``training/teacher_pictures``; those that are there already are not drawn again. Each process draws its
    share.

    Raises:
        FileExistsError: a file that latentdiff did not draw has the name of one of them.
    """
    if not prompts:
        return settings
    state, folder = processes(), settings.folder / "teacher_pictures"
    count = min(settings.prompt_pictures, FEW) if settings.is_dry_run else settings.prompt_pictures
    guidance_scale = settings.guidance_scale[0] if len(settings.guidance_scale) == 1 else settings.sample_guidance_scale
    common: dict[str, Any] = {
        "count": 1,
        "negative_prompt": None,
        "num_inference_steps": settings.teacher_steps,
        "guidance_scale": guidance_scale,
        "model": settings.model,
        "width": settings.resolution,
        "height": settings.resolution,
    }
    drawings = [
        Drawing(folder / f"{i:06d}.png", {**common, "prompts": [prompts[i % len(prompts)]], "seed": settings.seed + i})
        for i in range(count)
    ]
    absent = missing(drawings)
    state.wait_for_everyone()  # all have looked before any draws
    if absent and state.is_main_process:
        logger.info("the teacher draws %d pictures into %s", len(absent), folder)
    pipeline.to(state.device)

    def output_of(batch: Any) -> Any:
        return pipeline(
            [drawing.settings["prompts"][0] for drawing in batch],
            seed=[drawing.settings["seed"] for drawing in batch],
            output_type="pil",
            **{key: common[key] for key in ("num_inference_steps", "guidance_scale", "width", "height")},
        )

    kept = {"scheduler": type(pipeline.scheduler).__name__, "precision": "float32", "version": __version__}
    began = time.monotonic()
    draw(absent[state.process_index :: state.num_processes], output_of, BATCH, kept, "the teacher's pictures")
    if settings.is_dry_run:
        seconds = duration((time.monotonic() - began) * settings.prompt_pictures / count)
        logger.info(
            "drawing %d pictures, before all else, takes the teacher about %s", settings.prompt_pictures, seconds
        )
    pipeline.to("cpu")
    if state.is_main_process:
        rows = [{"file_name": one.file.name, "text": one.settings["prompts"][0]} for one in drawings]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_whole(folder / "metadata.jsonl", lines)
    state.wait_for_everyone()
    return settings.completed(data=str(folder))


def captions_alone(settings: DistillationSettings, pipeline: Any, prompts: list[str]) -> Data:
    """Prompts without pictures, or classes; some are held out as of pictures, those that are the same together.

    Raises:
        ValueError: see `with_class_names`.
    """
    digests = (hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts)
    size = (settings.resolution, settings.resolution)
    named = [
        CaptionedPicture(f"{settings.prompts}, prompt {i}", bytes, (prompt,), digest=digest, size=size)
        for i, (prompt, digest) in enumerate(zip(prompts, digests, strict=True), 1)
    ]
    if isinstance(pipeline, DiTPipeline):  # a held-out class is one that is learned, too
        return with_class_names(Data(*hold_out(named, settings.held_out_share, "class")), pipeline)
    return Data(*hold_out(named, settings.held_out_share))
