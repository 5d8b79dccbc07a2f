"""Noise schedules: the variances beta_t of the forward process, as float64 tables."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def linear_betas(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The schedule of DDPM (Ho et al. 2020, Sec. 4): beta rises linearly. Returns (T,) float64."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """The schedule of Latent Diffusion (Rombach et al. 2022): sqrt(beta) rises linearly. Returns (T,) float64."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def cosine_betas(num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """The schedule of Improved DDPM (Nichol & Dhariwal 2021, Eq. 17). Returns (T,) float64."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2

    steps = range(num_timesteps)
    betas = [min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), max_beta) for i in steps]
    return torch.tensor(betas, dtype=torch.float64)


# The names are those of diffusers' schedulers, plus the paper's own name for the cosine schedule.
SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
    "cosine": cosine_betas,
}


def make_betas(schedule: str, num_timesteps: int = 1000, zero_terminal_snr: bool = False) -> Tensor:
    """The betas of a named schedule, (T,) float64.

    Raises ValueError for an unknown name or fewer than two steps.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps must be at least 2, not {num_timesteps}")
    betas = SCHEDULES[schedule](num_timesteps)
    return rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha-bar) so that the last step is pure noise.

    "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al. 2024), Algorithm 1.
    """
    sqrt_alpha_bar = (1 - betas).cumprod(0).sqrt()  # (T,)
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas
