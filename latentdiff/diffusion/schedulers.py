"""diffusers' schedulers as samplers of a Gaussian process: settings for them, and what theirs say of the process."""

from collections.abc import Mapping
from typing import Any

from latentdiff.diffusion.betas import ENDS

LEARNED_VARIANCE_SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler")
"""Those that take a network's learned variances; others draw with the predicted mean alone."""

SCHEDULE_NAMES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")

# diffusers' names; the _log forms are the same variances, computed by way of the logarithm. Schedulers that draw no
# noise have none.
VARIANCE_NAMES = {
    None: "fixed_small",
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}


def takes_variance(scheduler: Any) -> bool:
    """Whether `scheduler` wants the C variance channels after the C channels of the prediction."""
    learned = getattr(scheduler, "config", {}).get("variance_type") == "learned_range"
    return learned and type(scheduler).__name__ in LEARNED_VARIANCE_SCHEDULERS


def make_scheduler(config: Mapping[str, Any], name: str) -> Any:
    """The diffusers scheduler class `name` with the settings of a process, and no clipping, which is for pixels.

    Raises:
        ValueError: diffusers has no scheduler of that name, or it cannot sample from this process.
    """
    import diffusers

    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class is None or not hasattr(scheduler_class, "from_config"):
        raise ValueError(f"diffusers has no scheduler named {name!r}; try 'DDIMScheduler' or 'UniPCMultistepScheduler'")
    config = {**config, "clip_sample": False, "set_alpha_to_one": True}
    if name not in LEARNED_VARIANCE_SCHEDULERS:
        config.pop("variance_type")
    known = scheduler_class._get_init_keys(scheduler_class)
    for key in ("prediction_type", "trained_betas" if "trained_betas" in config else "beta_schedule"):
        if key not in known:
            raise ValueError(f"diffusers' {name} has no {key}, so it cannot sample from this process")
    if config["rescale_betas_zero_snr"] and "rescale_betas_zero_snr" not in known:
        raise ValueError(f"diffusers' {name} cannot sample from a process with zero terminal SNR; try 'DDIMScheduler'")
    return scheduler_class(**{key: value for key, value in config.items() if key in known})


def samples_from_betas(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler with this config samples from a process of betas."""
    return config.get("trained_betas") is not None or config.get("beta_schedule") is not None


def variance_name(config: Mapping[str, Any]) -> str:
    """``variance_type`` of the process that a scheduler with this config samples from.

    Raises:
        ValueError: an unknown one.
    """
    variance = config.get("variance_type")
    if variance not in VARIANCE_NAMES:
        raise ValueError(
            f"the config of {config.get('_class_name') or 'this scheduler'} has variance_type={variance!r}; supported "
            f"are {', '.join(str(known) for known in VARIANCE_NAMES if known)}"
        )
    return VARIANCE_NAMES[variance]


def process_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `GaussianDiffusion` that a scheduler with this config samples from.

    Raises:
        ValueError: there is none; the message names the key.
    """
    name = config.get("_class_name") or "this scheduler"
    betas, schedule = config.get("trained_betas"), config.get("beta_schedule")
    if not samples_from_betas(config):
        raise ValueError(
            f"the config of {name} has neither beta_schedule nor trained_betas: it is no scheduler of a "
            f"process with betas (flow matching, for one, is another process)"
        )
    for key, neutral in (("use_flow_sigmas", (None, False)), ("snr_shift_scale", (None, 1, 1.0))):
        if config.get(key) not in neutral:
            raise ValueError(f"the config of {name} has {key}={config[key]!r}, which is not supported in training")
    if betas is None and schedule not in SCHEDULE_NAMES:
        raise ValueError(
            f"the config of {name} has beta_schedule={schedule!r}; supported are {', '.join(SCHEDULE_NAMES)}"
        )
    settings: dict[str, Any] = {
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "prediction_type": config.get("prediction_type", "epsilon"),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "variance_type": variance_name(config),
    }
    if betas is not None:
        return {**settings, "betas": list(betas)}
    if schedule in ENDS:  # where a config leaves them out, diffusers' own
        settings |= {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    return {**settings, "schedule": schedule}
