"""The denoising loop: from noise to latents, step by step."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from PIL import Image
from torch import Tensor

from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.call_scheduler import Sampler
from latentdiff.pipelines.core.output import ImagesOutput

P = ParamSpec("P")
Owner = TypeVar("Owner")
Result = TypeVar("Result")


class Denoiser(Protocol):
    """What gives the predictions; see `denoiser.GuidedDenoiser`."""

    guidance: ClassifierFreeGuidance

    def __call__(self, latents: Tensor, timestep: Any, guided: bool = True) -> Tensor: ...


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
        """B small pictures, (h, w), of the clean latents; costs next to nothing."""
        if self.colours is None:
            raise ValueError("these latents have no autoencoder to take colours from")
        return self.colours(self.clean)


def denoise(
    denoiser: Denoiser, sampler: Sampler, latents: Tensor, timesteps: Tensor, **options: Any
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
    dtype, channels = latents.dtype, sampler.prediction_channels(latents.shape[1])
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
                next(drawing)
            except StopIteration as end:
                return end.value

    return run
