"""A scheduler of diffusers as one call uses it: its plan of steps, its options, and the process behind it."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentdiff.codec import Generators
from latentdiff.diffusion import Process, process_of
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.pipelines.core.schedulers import without_learned_variance


@dataclass
class Sampler:
    """What is done with a scheduler in the course of a call.

    Args:
        scheduler: any of diffusers'. It keeps state from step to step, so that a call needs one of its own: `of`.
    """

    scheduler: Any

    @classmethod
    def of(cls, scheduler: Any) -> "Sampler":
        """With a copy of `scheduler` that leaves learned variances alone where it would only cut them off."""
        return cls(copy.deepcopy(without_learned_variance(scheduler)))

    @cached_property
    def process(self) -> Process:
        """What it samples from.

        Raises:
            ValueError: a process that is not known.
        """
        return process_of(self.scheduler)

    @property
    def first_scale(self) -> float:
        """The standard deviation of the noise that sampling starts from."""
        return getattr(self.scheduler, "init_noise_sigma", 1.0)

    def plan(
        self,
        num_inference_steps: int,
        device: torch.device,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Tensor:
        """Plan the sampling steps; `timesteps` or `sigmas` replace the scheduler's own plan. Returns (S,).

        Raises:
            ValueError: both are given, or one that this scheduler does not take; fewer than one step, or more than T.
        """
        scheduler = self.scheduler
        own = {name: list(v) for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
        if len(own) == 2:
            raise ValueError("give either timesteps or sigmas, not both")
        for name in own:
            if name not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(scheduler).__name__} does not take its own {name}; try another scheduler")
        if own:
            scheduler.set_timesteps(device=device, **own)
            return scheduler.timesteps
        most = getattr(scheduler.config, "num_train_timesteps", num_inference_steps)
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
            raise TypeError(f"num_inference_steps must be a whole number, not {num_inference_steps!r}")
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps must lie in [1, {most}], not {num_inference_steps}")
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.timesteps

    def last(self, timesteps: Tensor, planned: int, strength: float) -> Tensor:
        """Of the planned `timesteps`, the share `strength` that comes last, for a picture to start from.

        Args:
            timesteps: from `plan`; with some schedulers more than the steps that were asked for.
            planned: how many steps were asked for.

        Raises:
            ValueError: strength is outside [0, 1], or leaves no step.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], not {strength}")
        start = planned - min(int(planned * strength), planned)
        if start == planned:
            raise ValueError(f"strength={strength} of {planned} steps leaves none to run; give more of either")
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start * self.scheduler.order)
        return timesteps[start * self.scheduler.order :]

    def noised(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents (B, C, h, w) as they are at `timestep`, in the scheduler's own scale."""
        timesteps = timestep.reshape(1).repeat(len(latents))
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(latents, noise, timesteps)
        return self.scheduler.scale_noise(latents, timesteps, noise)  # as schedulers of flow matching call it

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents in the scheduler's scale as the network sees them, noise and picture of variance 1 together."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        return self.scheduler.scale_model_input(latents, timestep)

    def step_options(self, generator: Generators, eta: float) -> dict[str, Any]:
        """What of `generator` and `eta` (DDIM, Song et al. 2021, Eq. 16) the scheduler's ``step`` takes."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in taken}

    def prediction_channels(self, channels: int) -> int:
        """How many channels of a prediction for latents with `channels` the scheduler gets."""
        return 2 * channels if takes_variance(self.scheduler) else channels

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Tensor:
        """The latents at the next step, (B, C, h, w)."""
        return self.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
