"""What a prediction costs, for each picture of a batch: errors of the prediction, and the bound with its parts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.bounds import gaussian_log_likelihood, normal_kl
from latentdiff.diffusion.posterior import GaussianProcess

LogLikelihood = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, mean, log_variance) -> log likelihood in nats, elementwise; see `latentdiff.diffusion.bounds`."""


def training_losses(
    process: GaussianProcess,
    prediction: Tensor,
    x_start: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    weight: Tensor | float = 1.0,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
) -> Tensor:
    """The loss that `process.loss_type` names, for each picture, (B,).

    Args:
        prediction: for ``process.q_sample(x_start, timesteps, noise)``; (B, C, ...) or (B, 2C, ...).
        weight: (B,), of the error of the prediction, such as ``process.min_snr_weight``; a bound has its own weights.
        log_likelihood: of the bound's last step; the default suits latents.
    """
    if process.loss_type == "bound":
        x_t = process.q_sample(x_start, timesteps, noise)
        return process.num_timesteps * bound_term(process, prediction, x_start, timesteps, x_t, log_likelihood)
    error = l1_loss if process.loss_type == "l1" else simple_loss
    losses = weight * error(process, prediction, x_start, timesteps, noise)
    if process.loss_type == "hybrid":
        losses = losses + hybrid_bound(process, prediction, x_start, timesteps, noise, log_likelihood)
    return losses


def l1_loss(process: GaussianProcess, prediction: Tensor, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
    """Mean absolute error of the prediction, (B,). Arguments as of `simple_loss`."""
    target = process.training_target(x_start, timesteps, noise)
    return per_picture((process.split_variance(prediction)[0] - target).abs())


def simple_loss(
    process: GaussianProcess, prediction: Tensor, x_start: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the prediction (DDPM, Eq. 14, for any target), (B,).

    prediction: (B, C, ...) or, with learned variances, (B, 2C, ...); x_start, noise: (B, C, ...); timesteps: (B,).
    """
    target = process.training_target(x_start, timesteps, noise)
    return per_picture((process.split_variance(prediction)[0] - target).square())


def hybrid_bound(
    process: GaussianProcess,
    prediction: Tensor,
    x_start: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
) -> Tensor:
    """What the hybrid loss adds to the simple one to teach the variances, (B,).

    Improved DDPM (Nichol & Dhariwal 2021), Eq. 16: lambda L_vlb with lambda = 0.001. L_vlb is T times the mean of its
    terms, so a single term counts T / 1000. The predicted mean gets no gradient from it.
    """
    mean, variance = process.split_variance(prediction)
    assert variance is not None
    x_t = process.q_sample(x_start, timesteps, noise)
    frozen = torch.cat([mean.detach(), variance], dim=1)
    return bound_term(process, frozen, x_start, timesteps, x_t, log_likelihood) * (process.num_timesteps / 1000)


def bound_term(
    process: GaussianProcess,
    prediction: Tensor,
    x_start: Tensor,
    timesteps: Tensor,
    x_t: Tensor,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
    clip_denoised: bool = False,
) -> Tensor:
    """The term of the variational bound that belongs to each timestep, in bits per dimension, (B,).

    DDPM (Ho et al. 2020), Eq. 5: L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and for t = 0 the decoder's
    L_0 = -log p(x_0 | x_1) by `log_likelihood`. With t = 0, ..., T - 1 as in the code, x_t is the paper's x_{t+1}.

    Args:
        prediction: what the network gives for x_t: (B, C, ...) or, with learned variances, (B, 2C, ...).
        log_likelihood: the default suits latents; pixels want `discretized_gaussian_log_likelihood`.
        clip_denoised: keep the predicted x_0 in [-1, 1], for pixels.
    """
    true_mean, _, true_log_variance = process.q_posterior_mean_variance(x_start, x_t, timesteps)
    predicted = process.p_mean_variance(prediction, x_t, timesteps, clip_denoised)
    divergence = per_picture(normal_kl(true_mean, true_log_variance, predicted.mean, predicted.log_variance))
    decoder = -per_picture(log_likelihood(x_start, predicted.mean, predicted.log_variance))
    return torch.where(timesteps == 0, decoder, divergence) / math.log(2)


def prior_term(process: GaussianProcess, x_start: Tensor) -> Tensor:
    """L_T of the bound: how far q(x_T | x_0) is from N(0, 1), in bits per dimension, (B,) (DDPM, Eq. 5)."""
    last = torch.full((len(x_start),), process.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = process.q_mean_variance(x_start, last)
    zero = torch.zeros((), dtype=x_start.dtype, device=x_start.device)
    return per_picture(normal_kl(mean, log_variance.expand_as(mean), zero, zero)) / math.log(2)


def per_picture(x: Tensor) -> Tensor:
    """The mean of everything but the batch, (B,)."""
    return x.flatten(1).mean(1)
