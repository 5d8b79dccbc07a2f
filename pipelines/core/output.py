"""What a call gives."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass
class ImagesOutput(BaseOutput):
    """Pictures, as diffusers' ``StableDiffusionPipelineOutput`` has them.

    ``images``: B PIL images, an array (B, H, W, 3) with values in [0, 1], or a tensor (B, 3, H, W) in [0, 1] or of
    latents (B, C, h, w), by ``output_type``. ``nsfw_content_detected``: B truth values if there is a safety checker;
    what it objects to is black. ``seeds``: of each image, if seeds were given; with one of them alone the call draws
    that image again. ``scores``: of each image, with ``candidates``, best first within a prompt. ``nan_detected``: B
    truth values if a network gave values that are not finite, and which images are spoilt; else None.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    scores: list[float] | None = None
    nan_detected: list[bool] | None = None

    def select(self, kept: list[int]) -> None:
        """Leave what is known of these images, in this order; not the images themselves."""
        for name in ("nsfw_content_detected", "seeds", "nan_detected"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, [values[i] for i in kept])


def check_safety(pipeline: Any, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
    """Pictures (B, 3, H, W) with those black that the pipeline's checker objects to, and which; None without one."""
    if pipeline.safety_checker is None:
        return pixels, None
    pictures = pipeline.image_processor.postprocess(pixels, output_type="pil")
    seen = pipeline.feature_extractor(pictures, return_tensors="pt").pixel_values.to(pixels)
    pixels, flags = pipeline.safety_checker(images=pixels, clip_input=seen)
    withheld = [i for i, flag in enumerate(flags) if flag]
    if withheld:
        logger.warning(
            "The model's safety checker withheld %d of %d images, black now: number %s, counted from 0",
            *(len(withheld), len(flags), ", ".join(map(str, withheld))),
        )
    return pixels, flags


def report_faults(pipeline: Any, faults: dict[int, str], count: int) -> None:
    """Say which of `count` images have values that are not finite, by which network, and what helps."""
    for network in dict.fromkeys(faults.values()):
        images = ", ".join(str(i) for i, one in faults.items() if one == network)
        dtype = getattr(pipeline, network).dtype
        logger.warning(
            "The %s gave values that are not finite (NaN or infinite) in %s, for images number %s of %d, counted from "
            "0; %s",
            *(network, str(dtype).removeprefix("torch."), images, count),
            "its weights or what it was given must be damaged, or the guidance is too strong"
            if dtype in (torch.float32, torch.float64)
            else "load the model in a wider precision: dtype=torch.bfloat16 or torch.float32",
        )
