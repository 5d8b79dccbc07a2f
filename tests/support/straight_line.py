"""A network of two weights, and a run that trains it: for tests of the loop that trainers share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.objective import Objective, Result
from latentdiff.training.settings import RunSettings


@dataclass(frozen=True)
class Points:
    """(B, 2)"""

    x: Tensor
    names: tuple[str, ...] = ()


class Line(Objective[Points]):
    """A straight line through the origin; the batch's sum is its target."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(2))
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)

    def training_loss(self, batch: Points) -> Result:
        x = batch.x
        loss = (x @ self.slope - x.sum(1) * self.fixed).square().mean()
        return Result(loss, loss.detach(), {})


def settings(tmp_path: Path, **changes: Any) -> RunSettings:
    values = {"data": "-", "output": str(tmp_path), "max_steps": 40, "batch_size": 4, "learning_rate": 0.1}
    values |= {"warmup_steps": 0, "checkpoint_every": 10, "log_every": 5, "weight_decay": 0.0}
    return RunSettings.load(None, {**values, **changes})


def go(run: TrainingRun, batch: Callable[[int], Tensor] | None = None) -> TrainingRun:
    for number in run.passes():
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(number)) if batch is None else batch(number)
        run.learn(Points(x, tuple(f"{number}-{i}.png" for i in range(4))))
    run.save(must=True)
    return run
