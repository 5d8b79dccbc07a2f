"""A UNet that is told a class, and a classifier that shows it the way there."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from latentdiff.diffusion import Process, process_of
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.steps import DenoisingState, GuidedDenoiser

MEANS = ("DDPMScheduler", "DDPMParallelScheduler")
"""Schedulers that draw each step from a Gaussian, whose mean is shifted."""


@dataclass
class ClassifierGuidance:
    """Steps towards a class along a classifier's gradient. ADM (Dhariwal & Nichol 2021), Sec. 4.

    With a DDPM scheduler the mean of every step is shifted by ``scale`` times the variance times the gradient (Alg. 1),
    with any other the predicted noise (Alg. 2).

    Args:
        classifier: a ``NoisyClassifier``.
        class_labels: (B,) long.
        scale: the paper's s.
        scheduler: which samples.
    """

    classifier: Any
    class_labels: Tensor
    scale: float
    scheduler: Any

    def gradient(self, x: Tensor, timestep: Any) -> Tensor:
        """`scale` times that of log p(class | x), (B, C, h, w) float32."""
        x = x.to(self.classifier.dtype)
        return self.scale * self.classifier.log_probability_gradient(x, timestep, self.class_labels).float()

    @cached_property
    def process(self) -> Process:
        return process_of(self.scheduler)

    @property
    def shifts_means(self) -> bool:
        return type(self.scheduler).__name__ in MEANS

    def shifted_prediction(self, prediction: Tensor, x: Tensor, timestep: Any) -> Tensor:
        """Alg. 2, for what is predicted, noise, v or x_0: the noise less sqrt(1 - alpha-bar) times the gradient.

        Args:
            prediction: (B, C, h, w), or twice the channels with learned variances, which stay.
            x: what the network saw, (B, C, h, w).
        """
        return self.process.with_gradient(prediction, x, timestep, self.gradient(x, timestep))

    def shifted_step(self, state: DenoisingState) -> Tensor:
        """Alg. 1: the latents after a step, (B, C, h, w), moved by variance times gradient, but for the last step."""
        assert state.scaled is not None
        assert state.prediction is not None
        if int(state.timestep) == 0:
            return state.latents
        before = int(self.scheduler.previous_timestep(state.timestep))
        variance = self.process.step_variance(int(state.timestep), before, state.prediction)
        return state.latents + (variance * self.gradient(state.scaled, state.timestep)).to(state.latents.dtype)


class ClassDenoiser(GuidedDenoiser):
    """A ``UNet2DModel`` with the classes that it is told, if any, and its guidance.

    Args:
        unet: ours or diffusers'.
        guidance: between what is predicted with the class and without, as between a prompt and none.
        class_labels: (B,) long; with active guidance (2B,), those that stand for no class first. None: a UNet without
            class embeddings.
        towards: guidance by a classifier, on top.
    """

    def __init__(
        self,
        unet: Any,
        guidance: ClassifierFreeGuidance,
        class_labels: Tensor | None = None,
        towards: ClassifierGuidance | None = None,
    ) -> None:
        self.unet, self.guidance = unet, guidance
        self.class_labels, self.towards = class_labels, towards

    def predict(self, latents: Tensor, timestep: Tensor, text: slice = slice(None)) -> Tensor:
        told = {} if self.class_labels is None else {"class_labels": self.class_labels[text]}
        return self.unet(latents, timestep, return_dict=False, **told)[0]

    def __call__(self, latents: Tensor, timestep: Tensor, guided: bool = True) -> Tensor:
        prediction = super().__call__(latents, timestep, guided)
        if self.towards is None or self.towards.shifts_means:
            return prediction
        return self.towards.shifted_prediction(prediction, latents, timestep)
