"""Options that do nothing with the model at hand: who gives one is told before anything is drawn."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from latentdiff.pipelines.batch.drawing_options import GenerateOptions, defaults_of
from latentdiff.pipelines.batch.record import Settings

OF_GUIDANCE = ("guidance_rescale", "guidance_interval")
SCORES = ("aesthetic_score", "negative_aesthetic_score")
TARGETS = ("target_size", "negative_target_size")


def check_effects(pipeline: Any, settings: Settings, shown: Callable[[str], str] = str) -> None:
    """Every option in `settings` acts on what `pipeline` draws, the refiner included.

    Args:
        shown: how whoever gave an option calls it.

    Raises:
        ValueError: an option does nothing; the message says which, why, and what to do.
    """
    for name, why in idle_options(pipeline, settings).items():
        raise ValueError(f"{shown(name)}: {why}; leave it out")


def check_effects_on_each(pipeline: Any, common: Settings, each: Sequence[Settings]) -> None:
    """Every option in the settings of one of several pictures acts on it, and those in `common` on one of them.

    Raises:
        ValueError: see `check_effects`.
    """
    all_over = idle_options(pipeline, common)
    for number, one in enumerate(each, 1):
        idle = all_over if one is common else idle_options(pipeline, one)
        for name, why in idle.items():
            if getattr(one, name) != getattr(common, name):
                raise ValueError(f"prompt {number}: {name}: {why}; leave it out")
        all_over = {name: why for name, why in all_over.items() if name in idle}
    for name, why in all_over.items():
        raise ValueError(f"{name}: {why}; leave it out")


def idle_options(pipeline: Any, settings: Settings) -> dict[str, str]:
    """Options that do nothing, and why."""
    usual = defaults_of(GenerateOptions)
    given = [name for name in usual if getattr(settings, name) not in (usual[name], None, "")]
    reasons = {name: idle_because(pipeline, settings, name) for name in given}
    return {name: why for name, why in reasons.items() if why is not None}


def idle_because(pipeline: Any, settings: Settings, name: str) -> str | None:
    """Why an option does nothing; None: it acts."""
    if name == "strength" and name not in inspect.signature(type(pipeline).__call__).parameters:
        return "this model draws all of the picture, and not a part of the way to it"
    if name in SCORES + TARGETS and (why := idle_number(pipeline, settings, name)) is not None:
        return why
    if not name.startswith("negative_") and name not in OF_GUIDANCE:
        return None
    if getattr(pipeline, "guides_itself", False):
        return "this model has its guidance in its weights, and takes its scale alone"
    if settings.guidance_scale is not None and settings.guidance_scale <= 1:
        return f"it acts by guidance, of which there is none at a scale of {settings.guidance_scale:g}, but above 1"
    return None


def idle_number(pipeline: Any, settings: Settings, name: str) -> str | None:
    """The same of what SDXL's UNets are told in the place of each other: a score, or the size that pictures have."""
    refiner = getattr(pipeline, "refiner", None) if settings.refiner is not None else pipeline
    if refiner is None:
        return None  # not loaded, where nothing is drawn
    scored = {bool(getattr(one, "takes_scores", False)) for one in (pipeline, refiner)}
    if name in SCORES and True not in scored:
        return "SDXL's refiner takes it, as a model or beside one, and none such draws here"
    if name in TARGETS and False not in scored:
        return "SDXL's refiner takes an aesthetic_score in its place"
    return None
