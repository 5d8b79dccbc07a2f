"""Guidance by the gradient of a classifier of noisy pictures."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentdiff.pipelines.core.call_scheduler import Sampler
from latentdiff.pipelines.core.sampling import Progress

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
        sampler: of the call.
    """

    classifier: Any
    class_labels: Tensor
    scale: float
    sampler: Sampler

    @property
    def shifts_means(self) -> bool:
        return type(self.sampler.scheduler).__name__ in MEANS

    def gradient(self, x: Tensor, timestep: Any) -> Tensor:
        """`scale` times that of log p(class | x), (B, C, h, w) float32."""
        x = x.to(self.classifier.dtype)
        return self.scale * self.classifier.log_probability_gradient(x, timestep, self.class_labels).float()

    def change_prediction(self, prediction: Tensor, x: Tensor, timestep: Any) -> Tensor:
        """Alg. 2: a prediction whose noise is less by sqrt(1 - alpha-bar) times the gradient.

        Args:
            prediction: (B, C, h, w), or twice the channels with learned variances, which stay.
            x: what the network saw, (B, C, h, w).
        """
        if self.shifts_means:
            return prediction
        return self.sampler.process.with_gradient(prediction, x, timestep, self.gradient(x, timestep))

    def change_step(self, progress: Progress) -> Tensor:
        """Alg. 1: the latents after a step, (B, C, h, w), moved by variance times gradient, but for the last step."""
        timestep, latents = progress.timestep, progress.latents
        if not self.shifts_means or int(timestep) == 0:
            return latents
        before = int(self.sampler.scheduler.previous_timestep(timestep))
        variance = self.sampler.process.step_variance(int(timestep), before, progress.prediction)
        return latents + (variance * self.gradient(progress.scaled, timestep)).to(latents.dtype)
