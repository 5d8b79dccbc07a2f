"""diffusers' schedulers by short names."""

import copy
import re
from typing import Any

import torch

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.process import Clock, process_of
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
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""The schedulers that sample from a discrete process of betas and need no further package, by names easy to type."""

OF_FLOWS = {
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "flow-lcm": "FlowMatchLCMScheduler",
}
"""Those of flows, which the short names of the same solvers mean too where the model is one."""

OF_THE_PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
"""Keys that say what is sampled from. diffusers' ``from_config`` takes the other class's default where a scheduler was
made with its own, and LCM's and TCD's betas are others."""


def find_scheduler(name: str) -> str:
    """diffusers' class name for a short name or a class name, in whatever case.

    Raises:
        ValueError: no such scheduler; the message lists them.
    """
    every = SHORT_NAMES | OF_FLOWS
    known = {plain(key): class_name for key, class_name in every.items()}
    known |= {plain(class_name): class_name for class_name in every.values()}
    if plain(name) not in known:
        raise ValueError(f"unknown scheduler {name!r}; the schedulers are {', '.join(SHORT_NAMES)}")
    return known[plain(name)]


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower()).removesuffix("scheduler")


def change_scheduler(scheduler: Any, name: str) -> Any:
    """Another scheduler for the process that `scheduler` samples from.

    A process without betas is asked for it, for settings of betas mean nothing there.

    Raises:
        ValueError: no such scheduler, or it cannot sample from this process, or from one with zero terminal SNR and
            must here, or knows nothing of what the network predicts; or the process is not known.
    """
    import diffusers

    if isinstance(scheduler, Clock):
        raise ValueError(
            f"a model of codes draws in {scheduler.name} order and has no other scheduler; leave {name} out"
        )
    process = process_of(scheduler)
    if not isinstance(process, GaussianDiffusion):
        found = process.scheduler(find_scheduler(name))
        if type(found) is type(scheduler):
            return scheduler  # its settings are the model's, as of one that was distilled
        if type(process_of(found)) is not type(process):
            raise ValueError(f"the {type(found).__name__} cannot sample from the {process.name} process")
        return found
    class_name = find_scheduler(name)
    if class_name in OF_FLOWS.values():
        raise ValueError(f"the {class_name} samples from flows, and this model is of the {process.name} process")
    scheduler_class = getattr(diffusers, class_name)
    if scheduler.config.get("rescale_betas_zero_snr") and not knows_zero_snr(scheduler_class):
        able = [short for short, class_name in SHORT_NAMES.items() if knows_zero_snr(getattr(diffusers, class_name))]
        raise ValueError(
            f"the {scheduler_class.__name__} cannot draw with this model, which was trained with zero terminal "
            f"signal-to-noise ratio; these can: {', '.join(able)}"
        )
    known = scheduler_class._get_init_keys(scheduler_class)
    own = {key: scheduler.config[key] for key in OF_THE_PROCESS if key in known and key in scheduler.config}
    found = scheduler_class.from_config(scheduler.config, **own)
    check_prediction(found)
    return found


def check_prediction(scheduler: Any) -> None:
    """Raises ValueError if the scheduler cannot step by what the network predicts; some say so only at the first step.

    All know predictions of noise and of velocity, so only others are tried.
    """
    predicts = scheduler.config.get("prediction_type", "epsilon")
    if predicts in ("epsilon", "v_prediction"):
        return
    trial, latents = copy.deepcopy(scheduler), torch.zeros(1, 1, 1, 1)
    trial.set_timesteps(10)
    try:
        trial.step(trial.scale_model_input(latents, trial.timesteps[0]), trial.timesteps[0], latents)
    except (ValueError, NotImplementedError):
        raise ValueError(
            f"the {type(scheduler).__name__} cannot draw with a model whose prediction_type is {predicts!r}; ddim, "
            f"dpm++, euler, lcm, tcd and unipc can"
        ) from None


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
