"""How likely a picture is by a flow: the ordinary differential equation that leads it to noise, and its divergence."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.flow import RectifiedFlow
from latentdiff.diffusion.losses import Model

Velocity = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(x_t, t from 0 to 1) -> velocity (B, C, ...), and its divergence (B,) float64."""


@torch.no_grad()
def log_likelihood(process: RectifiedFlow, model: Model, clean: Tensor, probe: Tensor, steps: int) -> Tensor:
    """Log density of pictures or latents in nats, (B,) float64.

    log p(x_0) = log N(x_1; 0, 1) + the integral of div u(x_t, t) over t from 0 to 1 (Song et al. 2021, Eq. 39), where
    dx/dt = u is what the network predicts. The divergence is Hutchinson's estimate e^T (du/dx) e (FFJORD, Grathwohl et
    al. 2019, Eq. 7), without bias, and exact where the values of u do not depend on each other's.

    Args:
        model: gives the velocity; called four times in a step.
        clean: (B, C, ...) float32.
        probe: (B, C, ...), values of mean 0 and variance 1, of -1 and 1 best (`random_signs`).
        steps: of the fourth-order Runge-Kutta method, evenly spread.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more")

    def velocity(noisy: Tensor, t: float) -> tuple[Tensor, Tensor]:
        times = torch.full((len(noisy),), t * process.num_timesteps, device=noisy.device)
        with torch.enable_grad():
            noisy = noisy.detach().requires_grad_()
            found = model(noisy, process.model_time(times))[:, : noisy.shape[1]].float()
            (along,) = torch.autograd.grad((found * probe).sum(), noisy)
        return found.detach(), (along * probe).flatten(1).double().sum(1)

    noisy, change = clean, torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    for i in range(steps):
        moved, divergence = runge_kutta(velocity, noisy, i / steps, 1 / steps)
        noisy, change = noisy + moved, change + divergence
    ends = -0.5 * (noisy.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return ends + change


def runge_kutta(velocity: Velocity, noisy: Tensor, t: float, length: float) -> tuple[Tensor, Tensor]:
    """How far x_t moves in one step of the classical fourth-order method, and the divergence's integral over it."""
    first, a = velocity(noisy, t)
    second, b = velocity(noisy + length / 2 * first, t + length / 2)
    third, c = velocity(noisy + length / 2 * second, t + length / 2)
    fourth, d = velocity(noisy + length * third, t + length)
    return length / 6 * (first + 2 * second + 2 * third + fourth), length / 6 * (a + 2 * b + 2 * c + d)


def random_signs(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """-1 and 1 alike, (B, C, ...), of a generator for each picture: Hutchinson's probe of the least variance."""
    shape = like.shape[1:]
    signs = [torch.randint(0, 2, shape, generator=one, device=one.device) for one in generators]
    return torch.stack([2.0 * sign - 1 for sign in signs]).to(like)
