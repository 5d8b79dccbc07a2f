"""Classifier-free guidance, apart from the network and from the sampler."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Mixes a prediction made without the prompt and one made with it.

    "Classifier-Free Diffusion Guidance" (Ho & Salimans 2022), Eq. 6, in the convention of Imagen (Saharia et al. 2022,
    Eq. 2): ``scale`` is the paper's w + 1, so 1 is the plain conditional prediction.

    Args:
        scale: how strongly the prompt is followed; at 1 or less there is no guidance, and no second prediction needed.
        rescale: from 0 (off) to 1, how far the result is brought back to the conditional prediction's standard
            deviation, against overexposed pictures. Lin et al. 2024, "Common Diffusion Noise Schedules and Sample
            Steps are Flawed", Sec. 3.4.
    """

    scale: float
    rescale: float = 0.0

    @property
    def active(self) -> bool:
        """Whether a prediction without the prompt is needed."""
        return self.scale > 1

    def __call__(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """(B, C, h, w) of both predictions -> the guided one, of the same shape."""
        guided = unconditional + self.scale * (conditional - unconditional)  # Ho & Salimans 2022, Eq. 6
        if self.rescale > 0:
            rescaled = guided * (per_image_std(conditional) / per_image_std(guided))  # Lin et al. 2024, Eq. 15
            guided = self.rescale * rescaled + (1 - self.rescale) * guided  # Eq. 16
        return guided


def per_image_std(x: Tensor) -> Tensor:
    """Standard deviation of each batch entry, (B, 1, 1, 1) (Lin et al. 2024, Eq. 14)."""
    return x.std(dim=list(range(1, x.ndim)), keepdim=True)
