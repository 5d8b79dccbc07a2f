"""Noise schedules: the variances beta_t of the forward process, as float64 tables."""

import math
from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from latentdiff.interchange.user_files import MAX_TRAIN_TIMESTEPS


def linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The schedule of DDPM (Ho et al. 2020, Sec. 4): beta rises linearly. Returns (T,) float64."""
    return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)


def scaled_linear_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The schedule of Latent Diffusion (Rombach et al. 2022): sqrt(beta) rises linearly. Returns (T,) float64."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2


def sigmoid_betas(num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The schedule of GeoDiff (Xu et al. 2022): beta rises along a sigmoid. Returns (T,) float64."""
    rise = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64).sigmoid()
    return beta_start + (beta_end - beta_start) * rise


def cosine_betas(num_timesteps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """The schedule of Improved DDPM (Nichol & Dhariwal 2021, Eq. 17). Returns (T,) float64."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2

    steps = range(num_timesteps)
    betas = [min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), max_beta) for i in steps]
    return torch.tensor(betas, dtype=torch.float64)


# The names are those of diffusers' schedulers, plus the paper's own name for the cosine schedule.
SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}

ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}
"""The first and last beta of the schedules that have a choice, where nothing else is said."""


def make_betas(
    schedule: str,
    num_timesteps: int = 1000,
    zero_terminal_snr: bool = False,
    beta_start: float | None = None,
    beta_end: float | None = None,
) -> Tensor:
    """The betas of a named schedule, (T,) float64; `beta_start` and `beta_end` replace its own ends.

    Raises:
        ValueError: an unknown name; a number of steps that is not from 2 to `MAX_TRAIN_TIMESTEPS`; or ends that cannot
            be, or of a schedule that has none.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    whole = isinstance(num_timesteps, Integral) and not isinstance(num_timesteps, bool)
    if not whole or not 2 <= num_timesteps <= MAX_TRAIN_TIMESTEPS:
        limits = f"at least 2 and at most {MAX_TRAIN_TIMESTEPS:,}"
        raise ValueError(f"num_timesteps must be a whole number, {limits}, not {num_timesteps!r}")
    if schedule not in ENDS and (beta_start, beta_end) != (None, None):
        raise ValueError(f"the {schedule} schedule has no beta_start and beta_end")
    betas = check_betas(SCHEDULES[schedule](num_timesteps, *schedule_ends(schedule, beta_start, beta_end)))
    return rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas


def schedule_ends(schedule: str, beta_start: float | None, beta_end: float | None) -> tuple[float, ...]:
    """The first and last beta of a schedule, its own where None is given; () for a schedule without a choice."""
    given = zip((beta_start, beta_end), ENDS.get(schedule, ()), strict=False)
    return tuple(own if end is None else end for end, own in given)


def check_betas(betas: Tensor) -> Tensor:
    """The same betas. Raises ValueError if they are not two or more numbers above 0 and up to 1."""
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"betas must be a row of at least 2 numbers, not of shape {tuple(betas.shape)}")
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(f"betas must lie above 0 and not above 1; these go from {betas.min():g} to {betas.max():g}")
    return betas


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha-bar) so that the last step is pure noise.

    "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al. 2024), Algorithm 1.
    """
    sqrt_alpha_bar = (1 - betas).cumprod(0).sqrt()  # (T,)
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas
