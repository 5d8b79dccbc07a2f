"""What the configs of diffusers' schedulers say of the diffusion process they sample from."""

from collections.abc import Mapping
from typing import Any

from latentdiff.diffusion.schedules import ENDS

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


def process_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `GaussianDiffusion` that a scheduler with this config samples from.

    Raises:
        ValueError: there is none; the message names the key.
    """
    name = config.get("_class_name") or "this scheduler"
    betas, schedule = config.get("trained_betas"), config.get("beta_schedule")
    if betas is None and schedule is None:
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
    variance = config.get("variance_type")
    if variance not in VARIANCE_NAMES:
        raise ValueError(
            f"the config of {name} has variance_type={variance!r}; supported are "
            f"{', '.join(str(known) for known in VARIANCE_NAMES if known)}"
        )
    settings: dict[str, Any] = {
        "num_timesteps": config.get("num_train_timesteps", 1000),
        "prediction_type": config.get("prediction_type", "epsilon"),
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "variance_type": VARIANCE_NAMES[variance],
    }
    if betas is not None:
        return {**settings, "betas": list(betas)}
    if schedule in ENDS:  # where a config leaves them out, diffusers' own
        settings |= {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    return {**settings, "schedule": schedule}
