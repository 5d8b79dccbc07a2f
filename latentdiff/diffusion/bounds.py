"""Normal distributions of which the variational bound is made: divergences and likelihoods, in nats per element."""

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """D_KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))), elementwise, broadcast."""
    ratio = log_variance1 - log_variance2
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    # expm1, because the ratio is often so small that exp(ratio) - 1 keeps few digits of it.
    return 0.5 * (torch.expm1(ratio) - ratio + distance)


def gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log density of N(mean, exp(log_variance)) at x, elementwise: for data that is continuous, such as latents.

    It is a density: it can be above 0, and its bits compare models of the same latents, not of pictures.
    """
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() * torch.exp(-log_variance))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log probability that N(mean, exp(log_variance)) rounds to x, elementwise: for pixels (DDPM, Eq. 13).

    The distribution function is approximated, and logarithms are of 1e-12 at least, as in the code behind the papers'
    bits per dimension.

    x: whole numbers from 0 to 255, brought to [-1, 1]. The first and the last of them take the tails.
    """
    precision = torch.exp(-0.5 * log_variance)
    below_upper = normal_cdf((x - mean + 1 / 255) * precision)
    below_lower = normal_cdf((x - mean - 1 / 255) * precision)
    probability = torch.where(x < -0.999, below_upper, below_upper - below_lower)
    probability = torch.where(x > 0.999, 1 - below_lower, probability)
    return torch.log(probability.clamp(min=1e-12))


def normal_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function, within 2e-4 (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
