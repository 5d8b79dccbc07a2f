"""Watches the loss: its recent mean, and whether an update is bad."""

import math
from collections.abc import Sequence
from typing import Any


class LossWatch:
    """Notices losses that are not finite, or far above the recent mean.

    Args:
        explosion: a loss this many times the recent mean is a bad one.
    """

    MEMORY = 0.98  # weight of the past in the recent mean
    CALM = 20  # losses that must be seen before one can be far above the rest

    def __init__(self, explosion: float) -> None:
        self.explosion = explosion
        self.mean, self.seen = 0.0, 0
        self._since_report: list[float] = []

    def fault(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with an update of this loss and gradient norm, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient's norm is {gradient_norm} (loss {loss:.4g})"
        if self.seen >= self.CALM and abs(loss) > self.explosion * abs(self.mean):
            return f"the loss is {loss:.4g}, after a mean of {self.mean:.4g}"
        return None

    def add(self, loss: float) -> None:
        """Count a good loss."""
        weight = max(1 - self.MEMORY, 1 / (self.seen + 1))
        self.mean += weight * (loss - self.mean)
        self.seen += 1
        self._since_report.append(loss)

    def report(self) -> dict[str, float]:
        """Mean loss since the last report, if there was one."""
        losses, self._since_report = self._since_report, []
        return {"loss": sum(losses) / len(losses)} if losses else {}

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": self.seen, "since_report": list(self._since_report)}

    def restore(self, state: dict[str, Any]) -> None:
        self.mean, self.seen = float(state["mean"]), int(state["seen"])
        self._since_report = [float(loss) for loss in state["since_report"]]


def name_batch(names: Sequence[str], most: int = 8) -> str:
    """The pictures of a batch, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
