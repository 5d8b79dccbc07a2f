"""What a prediction costs, for each picture: errors, the variational bound with its parts, and bits per dimension."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm_formulas import GaussianProcess
from latentdiff.diffusion.process import TARGETS, per_picture

LogLikelihood = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, mean, log_variance) -> log likelihood in nats, elementwise."""
Model = Callable[[Tensor, Tensor], Tensor]
"""(x_t, timesteps of the process that it was trained on) -> its prediction."""


# Normal distributions, in nats per element


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


# Losses, (B,)


def training_losses(
    process: GaussianProcess,
    prediction: Tensor,
    x_start: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    weight: Tensor | float = 1.0,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss that `process.loss_type` names, for each picture, (B,).

    Args:
        prediction: for ``process.q_sample(x_start, timesteps, noise)``; (B, C, ...) or (B, 2C, ...).
        weight: (B,), of the error of the prediction, such as ``process.min_snr_weight``; a bound has its own weights.
        log_likelihood: of the bound's last step; the default suits latents.
        mask: see `per_picture`; of the bound's terms too.
    """
    if process.loss_type == "bound":
        x_t = process.q_sample(x_start, timesteps, noise)
        return process.num_timesteps * bound_term(
            process, prediction, x_start, timesteps, x_t, log_likelihood, mask=mask
        )
    if process.loss_type == "l1":
        target = process.target(x_start, noise, timesteps)
        losses = weight * per_picture((process.split_variance(prediction)[0] - target).abs(), mask)
    else:
        losses = weight * process.error(prediction, x_start, noise, timesteps, mask)  # DDPM, Eq. 14
    if process.loss_type == "hybrid":
        losses = losses + hybrid_bound(process, prediction, x_start, timesteps, noise, log_likelihood, mask)
    return losses


def hybrid_bound(
    process: GaussianProcess,
    prediction: Tensor,
    x_start: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
    mask: Tensor | None = None,
) -> Tensor:
    """What the hybrid loss adds to the simple one to teach the variances, (B,).

    Improved DDPM (Nichol & Dhariwal 2021), Eq. 16: lambda L_vlb with lambda = 0.001. L_vlb is T times the mean of its
    terms, so a single term counts T / 1000. The predicted mean gets no gradient from it.
    """
    mean, variance = process.split_variance(prediction)
    assert variance is not None
    x_t = process.q_sample(x_start, timesteps, noise)
    frozen = torch.cat([mean.detach(), variance], dim=1)
    bound = bound_term(process, frozen, x_start, timesteps, x_t, log_likelihood, mask=mask)
    return bound * (process.num_timesteps / 1000)


def bound_term(
    process: GaussianProcess,
    prediction: Tensor,
    x_start: Tensor,
    timesteps: Tensor,
    x_t: Tensor,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
    clip_denoised: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The term of the variational bound that belongs to each timestep, in bits per dimension, (B,).

    DDPM (Ho et al. 2020), Eq. 5: L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and for t = 0 the decoder's
    L_0 = -log p(x_0 | x_1) by `log_likelihood`. With t = 0, ..., T - 1 as in the code, x_t is the paper's x_{t+1}.

    Args:
        prediction: what the network gives for x_t: (B, C, ...) or, with learned variances, (B, 2C, ...).
        log_likelihood: the default suits latents; pixels want `discretized_gaussian_log_likelihood`.
        clip_denoised: keep the predicted x_0 in [-1, 1], for pixels.
        mask: see `per_picture`.
    """
    true_mean, _, true_log_variance = process.q_posterior_mean_variance(x_start, x_t, timesteps)
    predicted = process.p_mean_variance(prediction, x_t, timesteps, clip_denoised)
    divergence = per_picture(normal_kl(true_mean, true_log_variance, predicted.mean, predicted.log_variance), mask)
    decoder = -per_picture(log_likelihood(x_start, predicted.mean, predicted.log_variance), mask)
    return torch.where(timesteps == 0, decoder, divergence) / math.log(2)


def prior_term(process: GaussianProcess, x_start: Tensor) -> Tensor:
    """L_T of the bound: how far q(x_T | x_0) is from N(0, 1), in bits per dimension, (B,) (DDPM, Eq. 5)."""
    last = torch.full((len(x_start),), process.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = process.q_mean_variance(x_start, last)
    zero = torch.zeros((), dtype=x_start.dtype, device=x_start.device)
    return per_picture(normal_kl(mean, log_variance.expand_as(mean), zero, zero)) / math.log(2)


# The bound of whole pictures


class BitsPerDimension(NamedTuple):
    """Of each picture. The bound is ``prior`` and all ``terms`` together; with discretised pixels it is one on the
    length of the shortest code."""

    total: Tensor
    """(B,)"""
    prior: Tensor
    """(B,), what q(x_T | x_0) says beyond noise: nothing that is learned."""
    terms: Tensor
    """(B, T), by timestep; the first is the decoder's."""
    start_errors: Tensor
    """(B, T), mean squared errors of the predicted x_0"""
    noise_errors: Tensor
    """(B, T), of the predicted noise"""


@torch.no_grad()
def bits_per_dimension(
    process: GaussianProcess,
    model: Model,
    x_start: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
    clip_denoised: bool = False,
) -> BitsPerDimension:
    """Every term of the bound with one draw of noise each. DDPM (Ho et al. 2020), Eq. 5; float64 sums.

    Args:
        process: a `GaussianDiffusion`, with as many steps as are to be coded in; its `respaced` makes one with few.
        model: gives (B, C, ...), or (B, 2C, ...) with learned variances.
        x_start: (B, C, ...).
        generator: for all pictures, or a list with one of each.
        log_likelihood: of the last step; the default suits latents, pixels want `discretized_gaussian_log_likelihood`.
        clip_denoised: keep the predicted x_0 in [-1, 1], for pixels.
    """
    from diffusers.utils.torch_utils import randn_tensor  # not with the module: it takes a while

    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(process.num_timesteps):
        timesteps = torch.full((len(x_start),), t, device=x_start.device)
        noise = randn_tensor(x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype)
        x_t = process.q_sample(x_start, timesteps, noise)
        prediction = model(x_t, process.model_time(timesteps))
        term = bound_term(process, prediction, x_start, timesteps, x_t, log_likelihood, clip_denoised)
        found = process.p_mean_variance(prediction, x_t, timesteps, clip_denoised).x_start
        found_noise = TARGETS["sample"].noise(x_t, found, *process.coefficients(timesteps, x_t))
        columns.append((term, per_picture((found - x_start).square()), per_picture((found_noise - noise).square())))
    terms, start_errors, noise_errors = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    prior = prior_term(process, x_start)
    total = (terms.double().sum(1) + prior).to(prior.dtype)
    return BitsPerDimension(total, prior, terms, start_errors, noise_errors)
