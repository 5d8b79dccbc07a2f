"""The denoising loop: from noise to latents, step by step, with any scheduler of diffusers."""

import copy
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from PIL import Image
from torch import Tensor

from latentdiff.codec import Generators
from latentdiff.diffusion import Process, process_of
from latentdiff.diffusion.flow import check_flow
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.memory import DRAWING, memory_advice
from latentdiff.pipelines.core.denoiser import GuidedDenoiser
from latentdiff.pipelines.core.output import ImagesOutput

P = ParamSpec("P")
Owner = TypeVar("Owner")
Result = TypeVar("Result")


@dataclass
class Sampler:
    """A scheduler as one call uses it: its plan of steps, its options, and the process behind it.

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

    def plan(
        self,
        num_inference_steps: int,
        device: torch.device,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Tensor:
        """Plan the sampling steps; `timesteps` or `sigmas` replace the scheduler's own plan. Returns (S,).

        The plan stays in the processor's memory, where schedulers read it at every step without waiting for a GPU.

        device: of the latents.

        A ``steps_offset`` that would lead beyond the process's T steps, as 1 does with T of them, is cut to fit.

        Raises:
            ValueError: both are given, or one that this scheduler does not take; timesteps beyond the process; fewer
                than one step, or more than T, or than the scheduler can tell apart; or the network is a flow's and the
            scheduler does not sample from it.
        """
        scheduler = self.scheduler
        check_flow(scheduler)
        if device.type != "mps":  # which has no float64, as some plans are in; schedulers see to it
            device = torch.device("cpu")
        own = {name: list(v) for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
        if len(own) == 2:
            raise ValueError("give either timesteps or sigmas, not both")
        for name in own:
            if name not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(scheduler).__name__} does not take its own {name}; try another scheduler")
        most = getattr(scheduler.config, "num_train_timesteps", num_inference_steps)
        in_steps = hasattr(scheduler, "alphas_cumprod")
        if in_steps and not all(0 <= one < most for one in timesteps or ()):
            raise ValueError(f"timesteps must lie in [0, {most - 1}]")
        if own:
            scheduler.set_timesteps(device=device, **own)
            return scheduler.timesteps
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps must lie in [1, {most}], not {num_inference_steps}")
        self._set_steps(num_inference_steps, device)
        beyond, offset = int(scheduler.timesteps.max()) - (most - 1), scheduler.config.get("steps_offset", 0)
        if in_steps and beyond > 0 and offset > 0:
            scheduler.register_to_config(steps_offset=max(offset - beyond, 0))
            self._set_steps(num_inference_steps, device)
        self._check_apart(num_inference_steps, most)
        return scheduler.timesteps

    def _set_steps(self, count: int, device: torch.device) -> None:
        """Raises ValueError for a number of steps that the scheduler has no plan of, as PNDM of fewer than four."""
        if count == 1 and self.scheduler.config.get("shift_terminal"):
            self.scheduler.register_to_config(
                shift_terminal=None
            )  # where a plan of several ends; of one diffusers has nan
        try:
            self.scheduler.set_timesteps(count, device=device)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"the {type(self.scheduler).__name__} cannot plan num_inference_steps={count} ({error}); give more "
                f"steps, or another scheduler"
            ) from error

    def _check_apart(self, planned: int, most: int) -> None:
        """Raises ValueError if steps have the same noise level, between which multistep solvers divide by zero."""
        scheduler = self.scheduler
        sigmas = getattr(scheduler, "sigmas", torch.empty(0))[:-1]
        if "Multistep" in type(scheduler).__name__ and (sigmas[1:] == sigmas[:-1]).any():
            raise ValueError(
                f"the {type(scheduler).__name__} cannot tell {planned} of {most} steps apart, with timestep_spacing="
                f"{scheduler.config.get('timestep_spacing')!r}; give a smaller num_inference_steps"
            )

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

    def between(self, timesteps: Tensor, start: float | None, end: float | None) -> Tensor:
        """Of the planned `timesteps`, those between two shares of the way from noise, where one model follows another.

        Which they are the process's time decides, as in diffusers, and not their number: eDiff-I (Balaji et al. 2022).
        A solver of second order is handed over at a step of its own, which the next model begins with.

        Raises:
            ValueError: there are none.
        """
        scheduler, chosen = self.scheduler, timesteps
        most = scheduler.config.num_train_timesteps
        if start is not None:
            count = int((timesteps < round(most - start * most)).sum())
            count += scheduler.order == 2 and count % 2 == 0
            chosen = timesteps[len(timesteps) - count :]
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(len(timesteps) - count)
        if end is not None:
            chosen = chosen[chosen >= round(most - end * most)]
        if not len(chosen):
            shares = {"denoising_start": start, "denoising_end": end}
            given = " and ".join(f"{name}={share}" for name, share in shares.items() if share is not None)
            verb = "lies between" if None not in shares.values() else "is left by"
            raise ValueError(f"none of the {len(timesteps)} steps {verb} {given}; give more steps, or other shares")
        return chosen

    def from_noise(self, noise: Tensor) -> Tensor:
        """Standard normal noise (B, C, h, w) in the scale that sampling starts from, after `plan`."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def noised(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Latents (B, C, h, w) as they are at `timestep`, in the scheduler's own scale."""
        timesteps = timestep.reshape(1).repeat(len(latents)).to(latents.device, non_blocking=True)
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(latents, noise, timesteps)
        return self.scheduler.scale_noise(latents, timesteps, noise)  # as schedulers of flow matching call it

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents in the scheduler's scale as the network sees them, noise and picture of variance 1 together."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, timestep)

    def step_options(self, generator: Generators, eta: float) -> dict[str, Any]:
        """What of `generator` and `eta` (DDIM, Song et al. 2021, Eq. 16) the scheduler's ``step`` takes."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in taken}

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Tensor:
        """The latents at the next step, (B, C, h, w)."""
        return self.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]


def without_learned_variance(scheduler: Any) -> Any:
    """The scheduler, or a copy that leaves learned variances alone if it would only cut them off.

    DPM-Solver takes ``variance_type`` over from a DDPM scheduler's config, and then keeps the first three channels of
    a prediction, however many the latents have. The steps here cut at the right place.
    """
    learned = getattr(scheduler, "config", {}).get("variance_type") in ("learned", "learned_range")
    if not learned or takes_variance(scheduler) or "variance_type" not in scheduler._get_init_keys(type(scheduler)):
        return scheduler
    if "DDPM" in type(scheduler).__name__:
        raise ValueError("a DDPM scheduler with variance_type='learned' is not supported; 'learned_range' is")
    return type(scheduler).from_config(scheduler.config, variance_type=None)


@dataclass
class Progress:
    """Where a drawing is after a step. When all is done, the last comes once more, with the ``output``."""

    step: int
    """0 for the first."""
    total: int
    timestep: Any
    latents: Tensor
    """(B, C, h, w), still noisy. What is put here is what the next step starts from."""
    scaled: Tensor = field(repr=False)
    """What the network saw, (B, C, h, w)."""
    prediction: Tensor = field(repr=False)
    """The network's prediction, (B, C, h, w), or twice the channels with learned variances."""
    sampler: Sampler = field(repr=False)
    colours: Callable[[Tensor], list[Image.Image]] | None = field(default=None, repr=False)
    """Clean latents to small pictures."""
    output: ImagesOutput | None = None

    @property
    def clean(self) -> Tensor:
        """(B, C, h, w), the latents without noise that the prediction stands for.

        Raises:
            ValueError: the scheduler's process is not known.
        """
        return self.sampler.process.clean(self.scaled, self.prediction, self.timestep)

    def preview(self) -> list[Image.Image]:
        """B small pictures, (h, w), of the clean latents, which costs next to nothing.

        With a ``preview_autoencoder`` in the pipeline they are as large as what is drawn.
        """
        if self.colours is None:
            raise ValueError("these latents have no autoencoder to take colours from")
        return self.colours(self.clean)


def denoise(
    denoiser: GuidedDenoiser, sampler: Sampler, latents: Tensor, timesteps: Tensor, **options: Any
) -> Iterator[Progress]:
    """From noise to latents; yields after each step; the caller can read and change what it gets.

    Args:
        denoiser: gives the prediction that the scheduler is made for. Learned variances after it are for a DDPM
            scheduler with ``variance_type="learned_range"``; others do not get to see them.
        sampler: after `Sampler.plan`.
        latents: (B, C, h, w), noise in the scheduler's scale.
        timesteps: (S,), those to run.
        options: for the scheduler's ``step``, from `Sampler.step_options`.
    """
    dtype, channels = latents.dtype, latents.shape[1] * (2 if takes_variance(sampler.scheduler) else 1)
    for i, timestep in enumerate(timesteps):
        scaled = sampler.scaled(latents, timestep)
        guidance = denoiser.guidance
        guided = guidance.interval is None or guidance.acts_at(sampler.process.noise_level(timestep))
        prediction = denoiser(scaled, timestep, guided)[:, :channels]
        latents = sampler.step(prediction, timestep, latents, **options).to(dtype)
        progress = Progress(i, len(timesteps), timestep, latents, scaled, prediction, sampler)
        yield progress
        latents = progress.latents


Steps = Generator[Progress, None, Result]
"""A drawing that goes on when the next step is asked for, and returns what the call gives."""


def whole(steps: Callable[Concatenate[Owner, P], Steps[Result]]) -> Callable[Concatenate[Owner, P], Result]:
    """A drawing written as a generator, made a function that runs it to the end and gives what it returns.

    The generator itself stays in reach as ``__wrapped__``; ``stream`` hands it out.
    """

    @wraps(steps)
    def run(self: Owner, *args: P.args, **kwargs: P.kwargs) -> Result:
        drawing = steps(self, *args, **kwargs)
        while True:
            try:
                with memory_advice(DRAWING):
                    next(drawing)
            except StopIteration as end:
                return end.value

    return run
