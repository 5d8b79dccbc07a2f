"""Classifier-free guidance, apart from the network and from the sampler."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Mixes a prediction made without the prompt and one made with it.

    "Classifier-Free Diffusion Guidance" (Ho & Salimans 2022), Eq. 6, in the convention of Imagen (Saharia et al. 2022,
    Eq. 2): ``scale`` is the paper's w + 1, so 1 is the plain conditional prediction.

    Args:
        scale: how strongly the prompt is followed, one for all images or one for each; at 1 or less there is no
            guidance, and no second prediction needed.
        rescale: from 0 (off) to 1, how far the result is brought back to the conditional prediction's standard
            deviation, against overexposed pictures. Lin et al. 2024, "Common Diffusion Noise Schedules and Sample
            Steps are Flawed", Sec. 3.4.
        interval: (low, high), noise levels sigma (noise to signal, 0 to infinity) between which guidance acts; outside
            the prediction is the conditional one. Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval
            Improves Sample and Distribution Quality in Diffusion Models", Sec. 3.

    Raises:
        ValueError: rescale is outside [0, 1], or the interval is empty.
    """

    scale: float | tuple[float, ...]
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale must lie in [0, 1], not {self.rescale}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"guidance_interval must be two noise levels, the lower one from 0 and first, not {self.interval}"
            )

    @property
    def active(self) -> bool:
        """Whether a prediction without the prompt is needed, for any image at any noise level."""
        return max(self.scale) > 1 if isinstance(self.scale, tuple) else self.scale > 1

    def acts_at(self, noise_level: float) -> bool:
        """Whether it is needed at this sigma."""
        return self.active and (self.interval is None or self.interval[0] < noise_level <= self.interval[1])

    def __call__(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """(B, C, h, w) of both predictions -> the guided one, of the same shape."""
        scale: float | Tensor
        if isinstance(self.scale, tuple):
            scale = torch.tensor(self.scale).clamp(min=1).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
            scale = scale.to(conditional, non_blocking=True)
        else:
            scale = self.scale
        guided = unconditional + scale * (conditional - unconditional)  # Ho & Salimans 2022, Eq. 6
        if self.rescale > 0:
            rescaled = guided * (per_image_std(conditional) / per_image_std(guided))  # Lin et al. 2024, Eq. 15
            guided = self.rescale * rescaled + (1 - self.rescale) * guided  # Eq. 16
        return guided


def per_image_std(x: Tensor) -> Tensor:
    """Standard deviation of each batch entry, (B, 1, 1, 1) (Lin et al. 2024, Eq. 14)."""
    return x.std(dim=list(range(1, x.ndim)), keepdim=True)
