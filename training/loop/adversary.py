"""A network that is trained against an objective, in the same passes and updates."""

from typing import Any

from accelerate import Accelerator
from torch import Tensor

from latentdiff.training.loop.optimizers import build_optimizer
from latentdiff.training.objectives.objective import Objective, RealAndFake
from latentdiff.training.settings import RunSettings


class Adversary:
    """An adversary's objective with its own optimizer.

    Args:
        objective: takes what the other objective's `Result.for_adversary` holds.
        learning_rate: None is that of the settings; otherwise it follows their schedule in proportion.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: RunSettings,
        objective: Objective[RealAndFake],
        learning_rate: float | None = None,
    ) -> None:
        self.accelerator, self.max_grad_norm = accelerator, settings.max_grad_norm
        rate = learning_rate or settings.learning_rate
        self.rate_ratio = rate / settings.learning_rate
        self.plain = objective
        self.module: Any
        optimizer = build_optimizer(settings, list(objective.train().parameters()), rate)
        self.module, self.optimizer = accelerator.prepare(objective, optimizer)
        self.figures: dict[str, Tensor] = {}

    def backward(self, batch: RealAndFake) -> Tensor:
        """Gradients of its own loss, which is returned."""
        result = self.module(batch)
        self.accelerator.backward(result.loss)
        self.figures = dict(result.figures)
        return result.loss.detach()

    def clip_gradients(self) -> None:
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)

    def change_weights(self, learning_rate: float) -> None:
        """One optimizer step, if it had a loss. learning_rate: of the other objective."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * self.rate_ratio
        if any(parameter.grad is not None for parameter in self.module.parameters()):
            self.optimizer.step()
