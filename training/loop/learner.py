"""The training step: gradients of every pass, and at the end of an accumulation one update of the weights."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from latentdiff.memory import TRAINING, memory_advice
from latentdiff.training.batch.batch_types import NamedBatch
from latentdiff.training.batch.random_choices import seed_of
from latentdiff.training.loop.distributed import in_parts, spread_modules
from latentdiff.training.loop.moving_average import average_of
from latentdiff.training.loop.optimizers_and_schedules import build_optimizer, learning_rate_at
from latentdiff.training.loop.power_averages import power_averages_of
from latentdiff.training.objectives.objective import Objective, RealAndFake
from latentdiff.training.settings import RunSettings

logger = logging.getLogger(__name__)

MOST_BAD_IN_A_ROW = 20  # with on_bad_loss=skip


class Learner:
    """An objective with all that changes its weights: optimizer, moving average, adversary.

    Args:
        objective: what is trained; see `Objective`.
        adversary: what is trained against it, with an optimizer of its own.
        adversary_rate: its learning rate; None is that of the settings.
        checkpoints: their folder, for a message.

    Attributes:
        objective: as Accelerate has wrapped it.
        plain: the same without the wrapper.
        average, powers: of the trained weights.

    Raises:
        ValueError: there is nothing to train, or FSDP or DeepSpeed is to train against an adversary.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: RunSettings,
        objective: Objective[Any],
        adversary: Objective[RealAndFake] | None,
        adversary_rate: float | None,
        checkpoints: Path,
    ) -> None:
        self.accelerator, self.settings, self.checkpoints = accelerator, settings, checkpoints
        if adversary is not None and in_parts(accelerator):
            raise ValueError(
                "neither FSDP nor DeepSpeed can train against a discriminator; use several processes without them"
            )
        objective.train()
        optimizer = build_optimizer(settings, objective)
        if settings.compile:
            objective.compile()
        self.objective: Any
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.plain: Objective[Any] = accelerator.unwrap_model(self.objective)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.adversary: Adversary | None = None
        if adversary is not None:
            self.adversary = Adversary(accelerator, settings, adversary, adversary_rate)
        self.average = average_of(self.parameters, settings, self.optimizer)
        if settings.ema_snapshots and spread_modules(self.objective):
            raise ValueError("ema_snapshots are not for FSDP, where no process has all weights; leave them out")
        self.powers = power_averages_of(self.plain, settings)
        self.watch = LossWatch(settings.explosion)
        self.skipped, self._bad_in_a_row = 0, 0
        self._pass_losses: list[Tensor] = []
        self._figures: dict[str, Tensor] = {}

    def learn(self, batch: NamedBatch, step: int) -> bool:
        """One pass, and at the end of an accumulation the update of `step`; returns whether there was one.

        Raises:
            FloatingPointError: the loss is bad and ``on_bad_loss`` is "stop", or too many in a row were.
        """
        accelerator, adversary = self.accelerator, self.adversary
        # Dropout, if the network has any, is drawn from the step too.
        torch.manual_seed(seed_of(self.settings.seed, step, len(self._pass_losses), accelerator.process_index))
        modules = [self.objective, *([] if adversary is None else [adversary.module])]
        self._set_learning_rate(learning_rate_at(self.settings, step))
        with memory_advice(TRAINING), accelerator.accumulate(*modules):
            self._pass_losses.append(self._backward(batch))
            if accelerator.sync_gradients:
                self._update(step, batch.names)
        return accelerator.sync_gradients

    def _backward(self, batch: NamedBatch) -> Tensor:
        """Gradients of both sides; returns the loss to watch, or the one that is not finite."""
        result = self.objective(batch)
        self.accelerator.backward(result.loss)
        losses = [result.loss.detach()]
        self._figures = dict(result.figures)
        if self.adversary is not None and result.for_adversary is not None:
            losses.append(self.adversary.backward(result.for_adversary))
        watched = result.watched
        for loss in reversed(losses):  # the first of them counts; on the device, so that nothing waits for it
            watched = torch.where(loss.isfinite(), watched, loss.to(watched.dtype))
        return watched

    def _update(self, step: int, names: Sequence[str]) -> None:
        """Clip, look whether loss and gradient are sound, and change the weights if so."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        if self.adversary is not None:
            self.adversary.clip_gradients()
        own_loss = torch.stack(self._pass_losses).mean().float()
        self._pass_losses.clear()
        found = [self.accelerator.reduce(own_loss, "mean"), own_loss]
        # In float16 the scaler expects gradients that overflow now and then, and leaves such updates out by itself.
        if norm is not None and self.accelerator.scaler is None:
            found.append(norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm).to(own_loss))
        loss, own, *norms = torch.stack([one.float() for one in found]).tolist()  # all at once: a GPU is waited for
        gradient_norm = norms[0] if norms else 0.0
        fault = self.watch.fault(loss, gradient_norm)
        if fault is None:
            self._bad_in_a_row = 0
            self.watch.add(loss)
            self._change_weights()
        else:
            self._leave_out(f"{fault} at step {step} (of this process alone: {own:.4g})", names)
        self.optimizer.zero_grad()
        if self.adversary is not None:
            self.adversary.optimizer.zero_grad()
        if fault is None:
            self.average.update()
            if self.powers is not None:
                self.powers.update()
        self.plain.after_update(fault is None)

    def _set_learning_rate(self, rate: float) -> None:
        """For the next step, which DeepSpeed makes with the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.adversary is not None:
            for group in self.adversary.optimizer.param_groups:
                group["lr"] = rate * self.adversary.rate_ratio

    def _change_weights(self) -> None:
        """One step of each optimizer whose side had a loss."""
        optimizers = [self.optimizer]
        if self.adversary is not None and self.adversary.had_a_loss:
            optimizers.append(self.adversary.optimizer)
        scaler = self.accelerator.scaler
        for optimizer in optimizers:
            if scaler is None:
                optimizer.step()
            else:  # Accelerate's own step would let the scaler forget what it knows of the others
                scaler.step(optimizer.optimizer)
        if scaler is not None:
            scaler.update()

    def _leave_out(self, fault: str, names: Sequence[str]) -> None:
        """Count and report an update that is not made, or raise FloatingPointError."""
        self.skipped += 1
        self._bad_in_a_row += 1
        if names:
            fault += f"; the last batch of process {self.accelerator.process_index} was {name_batch(names)}"
        if self.settings.on_bad_loss == "stop" or self._bad_in_a_row >= MOST_BAD_IN_A_ROW:
            changed = "changed" if self.accelerator.distributed_type == DistributedType.DEEPSPEED else "not changed"
            precise = "use mixed_precision=bf16 or no, " if self.settings.mixed_precision == "fp16" else ""
            good = f" The last good checkpoint is in {self.checkpoints}" if any(self.checkpoints.glob("step-*")) else ""
            raise FloatingPointError(
                f"{fault}. The weights were {changed} by it. Lower learning_rate, {precise}look at these pictures, "
                f"or leave such updates out with on_bad_loss=skip.{good}"
            )
        logger.warning("%s. The update was left out.", fault)
        if self.accelerator.scaler is not None:  # it must know of every update whose gradients it has seen
            self.accelerator.scaler.update()

    @property
    def averages(self) -> list[Tensor]:
        """All averages of the weights, for a checkpoint: the moving one, if there is one, then those of `powers`."""
        return [*self.average.weights, *([] if self.powers is None else self.powers.weights)]

    def restore_averages(self, averages: Sequence[Tensor], updates: int, power_updates: int) -> None:
        """Go on from those of a checkpoint."""
        count = 0 if self.powers is None else len(self.powers.weights)
        if self.powers is not None:
            self.powers.restore(averages[-count:], power_updates)
        self.average.restore(averages[: len(averages) - count], updates)

    def figures(self) -> dict[str, float]:
        """The objectives' figures, of the last pass and of the updates before."""
        found = {name: float(value) for name, value in self._figures.items()} | self.plain.recent_figures()
        if self.adversary is not None:
            found |= {name: float(value) for name, value in self.adversary.figures.items()}
        return found


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
        optimizer = build_optimizer(settings, objective.train(), rate)
        self.module, self.optimizer = accelerator.prepare(objective, optimizer)
        self.figures: dict[str, Tensor] = {}

    def backward(self, batch: RealAndFake) -> Tensor:
        """Gradients of its own loss, which is returned."""
        result = self.module(batch)
        self.accelerator.backward(result.loss)
        self.figures = dict(result.figures)
        return result.loss.detach()

    def clip_gradients(self) -> None:
        """After the other side's: with them, Accelerate has unscaled the gradients of all optimizers."""
        plainly = self.accelerator.scaler is not None
        clip = torch.nn.utils.clip_grad_norm_ if plainly else self.accelerator.clip_grad_norm_
        clip(self.module.parameters(), self.max_grad_norm)

    @property
    def had_a_loss(self) -> bool:
        """Whether there are gradients."""
        return any(parameter.grad is not None for parameter in self.module.parameters())


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
        found, self._since_report = self.so_far(), []
        return found

    def so_far(self) -> dict[str, float]:
        """The same, and the next report is as if there were none."""
        return {"loss": sum(self._since_report) / len(self._since_report)} if self._since_report else {}

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": self.seen, "since_report": list(self._since_report)}

    def restore(self, state: dict[str, Any]) -> None:
        self.mean, self.seen = float(state["mean"]), int(state["seen"])
        self._since_report = [float(loss) for loss in state["since_report"]]


def name_batch(names: Sequence[str], most: int = 8) -> str:
    """The pictures of a batch, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
