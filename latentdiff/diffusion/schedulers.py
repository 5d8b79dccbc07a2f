"""Samplers are diffusers' schedulers; these are the ones that match a process, so training and sampling agree."""

from typing import Any

from latentdiff.diffusion.gaussian import GaussianDiffusion


def scheduler_config(process: GaussianDiffusion) -> dict[str, Any]:
    """The settings that a diffusers scheduler needs to sample from `process`."""
    schedule = {"cosine": "squaredcos_cap_v2"}.get(process.schedule, process.schedule)
    config: dict[str, Any] = {
        "num_train_timesteps": process.num_timesteps,
        "beta_schedule": schedule,
        "prediction_type": process.prediction_type,
        "rescale_betas_zero_snr": process.zero_terminal_snr,
        # The last training step is where sampling starts; with zero terminal SNR nothing else is right
        # (Lin et al. 2024, Sec. 3.3).
        "timestep_spacing": "trailing",
    }
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}.get(schedule)
    if ends is not None:
        config["beta_start"], config["beta_end"] = ends
    return config


def build_scheduler(process: GaussianDiffusion, name: str = "DDIMScheduler") -> Any:
    """The diffusers scheduler class `name`, with the betas, prediction type and spacing of `process`.

    Raises:
        ValueError: diffusers has no scheduler of that name.
    """
    import diffusers

    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class is None or not hasattr(scheduler_class, "from_config"):
        raise ValueError(f"diffusers has no scheduler named {name!r}; try 'DDIMScheduler' or 'UniPCMultistepScheduler'")
    config = scheduler_config(process)
    if name == "DDIMScheduler":
        config |= {"clip_sample": False, "set_alpha_to_one": True}
    return scheduler_class(**config)
