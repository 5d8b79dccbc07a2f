"""A process as an extension: rectified flow (Liu et al. 2022; Lipman et al. 2022), x_t = (1 - t) x_0 + t eps."""

from collections.abc import Mapping
from typing import Any, Self

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from latentdiff.diffusion import Process, Target, register_process


class Velocity(Target):
    """The network predicts eps - x_0, the velocity along the straight line from the picture to the noise."""

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


@register_process
class StraightFlow(Process):
    """Times run from 0 to 1000, as the scheduler counts them.

    Args:
        shift: above 1, more of the training and of the sampling steps are at high noise (Esser et al. 2024, Eq. 23).
    """

    name, predicts, num_timesteps = "straight_flow", Velocity(), 1000

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def times(self, uniform: Tensor) -> Tensor:
        return 1000 * self.shift * uniform / (1 + (self.shift - 1) * uniform)

    def coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        sigma = times.to(like).view(-1, *[1] * (like.ndim - 1)) / 1000
        return 1 - sigma, sigma

    def level(self, time: Any) -> tuple[float, float]:
        return 1 - float(time) / 1000, float(time) / 1000

    def scheduler_config(self) -> dict[str, Any]:
        return {"num_train_timesteps": 1000, "shift": self.shift}

    def scheduler(self, name: str | None = None) -> Any:
        if name not in (None, "FlowMatchEulerDiscreteScheduler"):
            raise ValueError(f"a {name} cannot sample from a flow; use FlowMatchEulerDiscreteScheduler")
        return FlowMatchEulerDiscreteScheduler(**self.scheduler_config())

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        known = config.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
        return known and not config.get("use_dynamic_shifting", False)  # which shifts by the size of pictures

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(float(config.get("shift", 1.0)))
