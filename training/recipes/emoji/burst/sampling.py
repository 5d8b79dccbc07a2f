"""DDIM (Song et al. 2021) for v-predictions between any two noise levels."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.process import VelocityTarget

TARGET = VelocityTarget()

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy (B, C, h, w), timesteps (B,) long, states (B, L, D)) -> v (B, C, h, w)."""


class Levels:
    """Signal alpha and noise sigma of every timestep, float32 on one device; timestep -1 is the clean picture."""

    def __init__(self, process: GaussianDiffusion, device: torch.device) -> None:
        kept = torch.cat([process.alphas_cumprod, torch.ones(1, dtype=torch.float64)])  # index -1: no noise
        self.alpha, self.sigma = (t.float().to(device) for t in (kept.sqrt(), (1 - kept).sqrt()))

    def __call__(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) long -> (B, 1, 1, 1) each."""
        shape = (-1, 1, 1, 1)
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)

    def step(self, noisy: Tensor, velocity: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """One DDIM step (Eq. 12, eta 0) from timesteps `now` to `then`, (B,) each."""
        alpha, sigma = self(now)
        next_alpha, next_sigma = self(then)
        clean, noise = (make(noisy, velocity, alpha, sigma) for make in (TARGET.clean, TARGET.noise))
        return next_alpha * clean + next_sigma * noise


def trailing(steps: int, total: int = 1000) -> list[int]:
    """Timesteps of diffusers' "trailing" spacing, from the noisiest on, and -1 for the clean picture at the end."""
    return [round(total - i * total / steps) - 1 for i in range(steps)] + [-1]


@torch.no_grad()
def sample(
    network: Network,
    levels: Levels,
    noise: Tensor,
    states: Tensor,
    plan: list[int],
    guidance_scale: float = 1.0,
    empty: Tensor | None = None,
) -> Tensor:
    """Latents (B, C, h, w) drawn from noise along the timesteps of `plan`, guided if the scale is above 1.

    states: (B, L, D); empty: (1, L, D), of no prompt.
    """
    x = noise
    for now, then in itertools.pairwise(plan):
        x = guided_step(network, levels, x, states, now, then, guidance_scale, empty)
    return x


def guided_step(
    network: Network,
    levels: Levels,
    x: Tensor,
    states: Tensor,
    now: int | Tensor,
    then: int | Tensor,
    guidance_scale: float,
    empty: Tensor | None,
) -> Tensor:
    """One DDIM step under classifier-free guidance (Ho & Salimans 2021); `now`, `then`: one timestep, or (B,)."""
    start, end = (
        t if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device, dtype=torch.long) for t in (now, then)
    )
    if guidance_scale == 1 or empty is None:
        return levels.step(x, network(x, start, states).float(), start, end)
    both = torch.cat([empty.expand(len(x), -1, -1), states])
    without, with_prompt = network(torch.cat([x, x]), torch.cat([start, start]), both).float().chunk(2)
    return levels.step(x, torch.lerp(without, with_prompt, guidance_scale), start, end)
