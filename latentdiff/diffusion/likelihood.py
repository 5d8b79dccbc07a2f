"""The variational bound of whole pictures, in bits per dimension, with its parts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.bounds import gaussian_log_likelihood
from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.losses import LogLikelihood, bound_term, per_picture, prior_term

Model = Callable[[Tensor, Tensor], Tensor]
"""(x_t, timesteps of the process that it was trained on) -> its prediction."""


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
    process: GaussianDiffusion,
    model: Model,
    x_start: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    log_likelihood: LogLikelihood = gaussian_log_likelihood,
    clip_denoised: bool = False,
) -> BitsPerDimension:
    """Every term of the bound with one draw of noise each. DDPM (Ho et al. 2020), Eq. 5; float64 sums.

    Args:
        process: with as many steps as are to be coded in; `GaussianDiffusion.respaced` makes one with few.
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
        prediction = model(x_t, process.model_timesteps(timesteps))
        term = bound_term(process, prediction, x_start, timesteps, x_t, log_likelihood, clip_denoised)
        found = process.p_mean_variance(prediction, x_t, timesteps, clip_denoised).x_start
        found_noise = process.predict_noise_from_start(x_t, timesteps, found)
        columns.append((term, per_picture((found - x_start).square()), per_picture((found_noise - noise).square())))
    terms, start_errors, noise_errors = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    prior = prior_term(process, x_start)
    total = (terms.double().sum(1) + prior).to(prior.dtype)
    return BitsPerDimension(total, prior, terms, start_errors, noise_errors)
