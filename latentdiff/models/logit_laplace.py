"""The output distribution of DALL-E's discrete VAE: for every value a location and a width, instead of the value."""

import torch
from torch import Tensor

MARGIN = 0.1
"""Values are squeezed from [0, 1] into [MARGIN, 1 - MARGIN], since the logit of 0 and of 1 is infinite."""

NARROWEST = 1 / 255
"""Least width, about a third of a grey level. On plain surfaces the likelihood would otherwise grow without bound."""


class LogitLaplace:
    """The logit-Laplace distribution of a picture's values; DALL-E (Ramesh et al. 2021), Appendix A.3, Eq. 2.

    The logit of a squeezed value follows a Laplace distribution, so that values lie within the range of pixels.

    Args:
        parameters: (B, 2C, H, W), locations of the logits and logarithms of their widths, in this order.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.location, log_width = parameters.float().chunk(2, dim=1)  # (B, C, H, W) each
        self.width = log_width.clamp(max=20.0).exp() + NARROWEST

    @property
    def pixels(self) -> Tensor:
        """(B, C, H, W) float32, the values at the locations: the medians, in [-1.25, 1.25]."""
        return (self.location.sigmoid() - 0.5) * 2 / (1 - 2 * MARGIN)

    def nll(self, pixels: Tensor) -> Tensor:
        """Negative log-likelihood of pixels (B, C, H, W) in [-1, 1], in nats of a squeezed value; of the same shape."""
        squeezed = 0.5 + 0.5 * (1 - 2 * MARGIN) * pixels.float()
        slope = squeezed * (1 - squeezed)
        return (squeezed.logit() - self.location).abs() / self.width + torch.log(2 * self.width * slope)
