"""Samplers are diffusers' schedulers; these are the ones that match a process, so training and sampling agree."""

from typing import Any

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.schedules import ENDS

LEARNED_VARIANCE_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler")
"""Those that take a network's learned variances; others draw with the predicted mean alone."""


def takes_variance(scheduler: Any) -> bool:
    """Whether `scheduler` wants the C variance channels after the C channels of the prediction."""
    learned = getattr(scheduler, "config", {}).get("variance_type") == "learned_range"
    return learned and type(scheduler).__name__ in LEARNED_VARIANCE_SCHEDULERS


def scheduler_config(process: GaussianDiffusion) -> dict[str, Any]:
    """The settings that a diffusers scheduler needs to sample from `process`."""
    schedule = {"cosine": "squaredcos_cap_v2"}.get(process.schedule, process.schedule)
    config: dict[str, Any] = {
        "num_train_timesteps": process.num_timesteps,
        "beta_schedule": schedule,
        "prediction_type": process.prediction_type,
        "variance_type": process.variance_type,
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        # The last training step is where sampling starts; with zero terminal SNR nothing else is right
        # (Lin et al. 2024, Sec. 3.3).
        "timestep_spacing": "trailing",
    }
    if process.given_betas is not None:
        config["trained_betas"] = process.given_betas.tolist()
    elif schedule in ENDS:
        first, last = ENDS[schedule]
        config["beta_start"] = first if process.beta_start is None else process.beta_start
        config["beta_end"] = last if process.beta_end is None else process.beta_end
    return config


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
