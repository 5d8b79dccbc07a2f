"""A diffusion process that the package does not have, made of what its contract asks for and no more."""

from collections.abc import Mapping
from typing import Any, Self

import diffusers
from torch import Tensor

from latentdiff.diffusion import Process
from latentdiff.diffusion.targets import Target


class StraightTarget(Target):
    """noise - clean."""

    name = "flow"

    def of(self, clean: Tensor, noise: Tensor, signal: Any, sigma: Any) -> Tensor:
        return noise - clean

    def clean(self, noisy: Tensor, prediction: Tensor, signal: Any, sigma: Any) -> Tensor:
        return noisy - sigma * prediction

    def noise(self, noisy: Tensor, prediction: Tensor, signal: Any, sigma: Any) -> Tensor:
        return noisy + signal * prediction

    def error_ratio(self, snr: Tensor) -> Tensor | float:
        return (1 + snr.sqrt()) ** 2

    def per_noise(self, signal: float, sigma: float) -> float:
        return 1 / signal if signal else 0.0


class Straight(Process):
    """x_t = (1 - t) x_0 + t eps: rectified flow (Liu et al. 2023)."""

    name, predicts, num_timesteps = "straight", StraightTarget(), 1000

    def times(self, uniform: Tensor) -> Tensor:
        return uniform

    def coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        times = times.to(like).view(-1, *[1] * (like.ndim - 1))
        return 1 - times, times

    def level(self, timestep: Any) -> tuple[float, float]:
        return 1 - float(timestep) / 1000, float(timestep) / 1000

    def model_time(self, times: Tensor) -> Tensor:
        return 1000 * times

    def scheduler_config(self) -> dict[str, Any]:
        return {"num_train_timesteps": 1000}

    def scheduler(self, name: str | None = None) -> Any:
        return getattr(diffusers, name or "FlowMatchEulerDiscreteScheduler")(**self.scheduler_config())

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return str(config.get("_class_name", "")).startswith("FlowMatch")

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        return cls()
