"""A UNet that is told a class, and a classifier that shows it the way there."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.pipelines.steps import DenoisingState, GuidedDenoiser, alpha_bar

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

    @property
    def shifts_means(self) -> bool:
        return type(self.scheduler).__name__ in MEANS

    def shifted_prediction(self, prediction: Tensor, x: Tensor, timestep: Any) -> Tensor:
        """Alg. 2, for what is predicted, noise, v or x_0: the noise less sqrt(1 - alpha-bar) times the gradient.

        Args:
            prediction: (B, C, h, w), or twice the channels with learned variances, which stay.
            x: what the network saw, (B, C, h, w).
        """
        kept = float(alpha_bar(self.scheduler, timestep))
        kind = self.scheduler.config.prediction_type
        if kept < 1e-8 and kind != "epsilon":  # pure noise says nothing of a class
            return prediction
        noise = (1 - kept) ** 0.5
        factor = {"epsilon": -noise, "v_prediction": -noise / max(kept, 1e-8) ** 0.5}.get(kind)
        if factor is None:
            factor = noise**2 / kept**0.5
        shift = (factor * self.gradient(x, timestep)).to(prediction.dtype)
        return torch.cat([prediction[:, : x.shape[1]] + shift, prediction[:, x.shape[1] :]], dim=1)

    def shifted_step(self, state: DenoisingState) -> Tensor:
        """Alg. 1: the latents after a step, (B, C, h, w), moved by variance times gradient, but for the last step."""
        assert state.scaled is not None
        assert state.prediction is not None
        if int(state.timestep) == 0:
            return state.latents
        variance = step_variance(self.scheduler, state.timestep, state.prediction)
        return state.latents + (variance * self.gradient(state.scaled, state.timestep)).to(state.latents.dtype)


def step_variance(scheduler: Any, timestep: Any, prediction: Tensor) -> Tensor:
    """The variance with which a DDPM scheduler draws this step: a scalar, or (B, C, h, w) where it is learned.

    DDPM (Ho et al. 2020), Eq. 7; Improved DDPM (Nichol & Dhariwal 2021), Eq. 15.

    Raises:
        ValueError: the scheduler's ``variance_type`` is not one of ours.
    """
    before = int(scheduler.previous_timestep(timestep))
    kept = alpha_bar(scheduler, timestep)
    kept_before = alpha_bar(scheduler, before) if before >= 0 else torch.ones_like(kept)
    beta = 1 - kept / kept_before
    small = ((1 - kept_before) / (1 - kept) * beta).clamp(min=1e-20)
    kind = scheduler.config.variance_type
    if takes_variance(scheduler):
        share = (prediction.chunk(2, dim=1)[1].float() + 1) / 2
        ends = torch.stack([small, beta]).log().tolist()
        return (share * ends[1] + (1 - share) * ends[0]).exp()
    variances = {"fixed_small": small, "fixed_small_log": small, "fixed_large": beta, "fixed_large_log": beta}
    if kind not in variances:
        raise ValueError(f"classifier guidance knows no scheduler with variance_type={kind!r}; try 'fixed_small'")
    return variances[kind].to(prediction.device, torch.float32)


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
