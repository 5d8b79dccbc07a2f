"""What a call gives."""

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class ImagesOutput(BaseOutput):
    """Pictures, as diffusers' ``StableDiffusionPipelineOutput`` has them.

    ``images``: B PIL images, an array (B, H, W, 3) with values in [0, 1], or a tensor (B, 3, H, W) in [0, 1] or of
    latents (B, C, h, w), by ``output_type``. ``nsfw_content_detected``: B truth values if there is a safety checker;
    what it objects to is black. ``seeds``: of each image, if seeds were given; with one of them alone the call draws
    that image again. ``scores``: of each image, with ``candidates``, best first within a prompt.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    scores: list[float] | None = None
