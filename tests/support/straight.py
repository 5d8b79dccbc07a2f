"""The rectified flow of docs/examples, in another unit: its times run from 0 to 1, and it takes every scheduler."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from latentdiff.diffusion import Process
from latentdiff.diffusion.process import PROCESSES

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "straight_flow.py"


def example() -> Any:
    """The module, without the registration that importing it brings."""
    known = [*PROCESSES]
    spec = importlib.util.spec_from_file_location("example_of_a_flow", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    PROCESSES[:] = known
    return module


StraightFlow: Any = example().StraightFlow


class Straight(StraightFlow, Process):  # type: ignore[misc]
    """x_t = (1 - t) x_0 + t eps."""

    name = "straight"

    def times(self, uniform: Tensor) -> Tensor:
        return uniform

    def coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return super().coefficients(1000 * times, like)  # type: ignore[no-any-return]

    def model_time(self, times: Tensor) -> Tensor:
        return 1000 * times

    def scheduler_config(self) -> dict[str, Any]:
        return {"num_train_timesteps": 1000}

    def scheduler(self, name: str | None = None) -> Any:
        return getattr(diffusers, name or "FlowMatchEulerDiscreteScheduler")(**self.scheduler_config())

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        return str(config.get("_class_name", "")).startswith("FlowMatch")
