"""What is to be said of a call that can be drawn, but hardly as it was meant: logged once, and told to who asked."""

import logging
import math
from collections.abc import Hashable

from latentdiff.pipelines.core.input_pictures import is_far
from latentdiff.pipelines.core.pipeline import FEW_STEPS, LatentPipeline

logger = logging.getLogger(__name__)


def warn_once(pipeline: LatentPipeline, key: Hashable, remark: str | None) -> None:
    """Log a remark, once for each `key` of a pipeline; None: there is nothing to be said."""
    if remark is not None and key not in pipeline.warned_of:
        pipeline.warned_of.add(key)
        logger.warning(remark)


def remark_on_size(pipeline: LatentPipeline, height: int, width: int) -> str | None:
    """Of a size in pixels, if it is far from what the UNet was trained on."""
    own = pipeline.trained_size
    if own is None or pipeline.draws_any_size or not is_far((height, width), own):
        return None
    return (
        f"Drawing {width} x {height} pixels (width x height) with a model that was trained on {own[1]} x {own[0]}: "
        "far from that size things come out doubled, joined or cut; draw at the default size and enlarge the picture"
    )


def remark_on_steps(pipeline: LatentPipeline, steps: int) -> str | None:
    """Of other steps than a distilled model was made for. With an LCM scheduler it was made for any few."""
    made = pipeline.made_for_steps
    few = type(pipeline.scheduler).__name__.endswith("LCMScheduler") and steps <= FEW_STEPS
    if made is None or steps == made or few:
        return None
    return (
        f"Drawing in {steps} steps with a model that was made for {made}: other numbers, more as well as fewer, are "
        f"mostly worse; by default it draws in {made}"
    )


def remark_on_guidance(pipeline: LatentPipeline, largest: float) -> str | None:
    """Of guiding a distilled model that was made to be drawn with without guidance."""
    made = pipeline.registered_defaults.get("guidance_scale", math.inf)
    if pipeline.made_for_steps is None or pipeline.guides_itself or largest <= 1 or made > 1:
        return None
    return (
        f"Drawing with guidance {largest:g} with a model that was made for none: its teacher's guidance is in its "
        f"weights, and more mostly makes pictures worse and takes twice the time; its default is {made:g}"
    )
