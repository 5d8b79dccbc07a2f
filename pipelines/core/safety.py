"""A model's safety checker: what it objects to becomes black."""

import logging
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


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
