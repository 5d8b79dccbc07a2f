"""Samplers are diffusers' schedulers; these are the ones that match a process, so training and sampling agree."""

from typing import Any

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.scheduler_configs import scheduler_config

LEARNED_VARIANCE_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler")
"""Those that take a network's learned variances; others draw with the predicted mean alone."""


def takes_variance(scheduler: Any) -> bool:
    """Whether `scheduler` wants the C variance channels after the C channels of the prediction."""
    learned = getattr(scheduler, "config", {}).get("variance_type") == "learned_range"
    return learned and type(scheduler).__name__ in LEARNED_VARIANCE_SCHEDULERS


def build_scheduler(process: GaussianDiffusion, name: str = "DDIMScheduler") -> Any:
    """The diffusers scheduler class `name`, with the betas, prediction type and spacing of `process`.

    Raises:
        ValueError: diffusers has no scheduler of that name, or it cannot sample from this process.
    """
    import diffusers

    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class is None or not hasattr(scheduler_class, "from_config"):
        raise ValueError(f"diffusers has no scheduler named {name!r}; try 'DDIMScheduler' or 'UniPCMultistepScheduler'")
    # clip_sample is for pixels
    config = {**scheduler_config(process), "clip_sample": False, "set_alpha_to_one": True}
    if name not in LEARNED_VARIANCE_SCHEDULERS:
        config.pop("variance_type")
    known = scheduler_class._get_init_keys(scheduler_class)
    for key in ("prediction_type", "trained_betas" if process.given_betas is not None else "beta_schedule"):
        if key not in known:
            raise ValueError(f"diffusers' {name} has no {key}, so it cannot sample from this process")
    if process.zero_terminal_snr and "rescale_betas_zero_snr" not in known:
        raise ValueError(f"diffusers' {name} cannot sample from a process with zero terminal SNR; try 'DDIMScheduler'")
    return scheduler_class(**{key: value for key, value in config.items() if key in known})
