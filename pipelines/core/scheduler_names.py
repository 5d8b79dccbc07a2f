"""diffusers' schedulers by short names."""

import re
from typing import Any

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.process import process_of
from latentdiff.pipelines.core.sampling import without_learned_variance

SHORT_NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-ancestral": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""The schedulers that sample from a discrete process of betas and need no further package, by names easy to type."""


def find_scheduler(name: str) -> str:
    """diffusers' class name for a short name or a class name, in whatever case.

    Raises:
        ValueError: no such scheduler; the message lists them.
    """
    known = {plain(key): class_name for key, class_name in SHORT_NAMES.items()}
    known |= {plain(class_name): class_name for class_name in SHORT_NAMES.values()}
    if plain(name) not in known:
        raise ValueError(f"unknown scheduler {name!r}; the schedulers are {', '.join(SHORT_NAMES)}")
    return known[plain(name)]


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower()).removesuffix("scheduler")


def change_scheduler(scheduler: Any, name: str) -> Any:
    """Another scheduler for the process that `scheduler` samples from.

    A process of an extension is asked for it, for settings of betas mean nothing there.

    Raises:
        ValueError: no such scheduler, or it cannot sample from this process, or from one with zero terminal SNR and
            must here; or the process is not known.
    """
    import diffusers

    process = process_of(scheduler)
    if not isinstance(process, GaussianDiffusion):
        found = process.scheduler(find_scheduler(name))
        if type(process_of(found)) is not type(process):
            raise ValueError(f"the {type(found).__name__} cannot sample from the {process.name} process")
        return found
    scheduler_class = getattr(diffusers, find_scheduler(name))
    if scheduler.config.get("rescale_betas_zero_snr") and not knows_zero_snr(scheduler_class):
        able = [short for short, class_name in SHORT_NAMES.items() if knows_zero_snr(getattr(diffusers, class_name))]
        raise ValueError(
            f"the {scheduler_class.__name__} cannot draw with this model, which was trained with zero terminal "
            f"signal-to-noise ratio; these can: {', '.join(able)}"
        )
    return scheduler_class.from_config(scheduler.config)


def knows_zero_snr(scheduler_class: Any) -> bool:
    return "rescale_betas_zero_snr" in scheduler_class._get_init_keys(scheduler_class)


def modern_scheduler(scheduler: Any) -> Any:
    """A scheduler as diffusers' ``StableDiffusionPipeline`` sets it right: ``steps_offset`` 1, no ``clip_sample``.

    And without learned variances where it does not know them.
    """
    scheduler = without_learned_variance(scheduler)
    config = getattr(scheduler, "config", {})
    right: dict[str, Any] = {}
    if config.get("steps_offset", 1) != 1:
        right["steps_offset"] = 1
    if config.get("clip_sample", False) is True:
        right["clip_sample"] = False
    return type(scheduler).from_config(config, **right) if right else scheduler
