"""What the trainers share: the optimizer, the moving average, checkpoints, progress, and stopping in good order."""

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentdiff.training.checkpoints import Checkpoints
from latentdiff.training.config import RunSettings

logger = logging.getLogger(__name__)


class TrainingRun:
    """One run of a trainer.

    Args:
        settings: the run's settings.
        objective: a module whose forward returns a loss.
        network: the part of `objective` that is trained, averaged and saved.

    The optimizer step counter `step` is what a checkpoint restores. Everything random derives from the seed and the
    step (see `generator`), so a resumed run goes on as if it had never stopped.
    """

    def __init__(self, settings: RunSettings, objective: nn.Module, network: nn.Module) -> None:
        self.settings = settings
        self.folder = Path(settings.output) / "training"
        self.accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
        )
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            settings.save(self.folder / "settings.yaml")
        optimizer = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if settings.compile:
            objective.compile()
        self.network = network
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.ema = EMAModel(network.parameters(), decay=settings.ema_decay, foreach=True)
        self.ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.ema)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator, settings.keep_checkpoints)
        self.step = self.checkpoints.load_latest()
        self.started, self.first_step = time.monotonic(), self.step
        self.losses: list[Tensor] = []
        self._stop_signal: int | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def generator(self, stream: int, number: int) -> torch.Generator:
        """A CPU generator for pass `number` of this process; `stream` keeps different uses apart."""
        mixed = hash((self.settings.seed, self.accelerator.process_index, stream, number))
        return torch.Generator().manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)

    def passes(self) -> Iterator[int]:
        """Numbers of the forward-backward passes that are left; ends at `max_steps`, at a signal or out of time.

        The trainer's loop body makes one call of `learn` per number.
        """
        bar = tqdm(
            total=self.settings.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=2.0,
        )
        self.started, self.first_step = time.monotonic(), self.step
        with self._signals(), bar:
            while self.step < self.settings.max_steps and not self._must_stop():
                before = self.step
                for k in range(self.settings.gradient_accumulation_steps):
                    yield before * self.settings.gradient_accumulation_steps + k
                bar.update(self.step - before)
                if self.losses and self.step % 10 == 0:
                    bar.set_postfix(self.progress())

    def learn(self, *inputs: Any, **named: Any) -> None:
        """One pass: loss of the objective on `inputs`, gradients, and at the end of an accumulation one update."""
        with self.accelerator.accumulate(self.objective):
            loss = self.objective(*inputs, **named)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.max_grad_norm)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.settings.learning_rate_at(self.step)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(loss.detach())
        if self.accelerator.sync_gradients:
            self.ema.step(self.network.parameters())
            self.step += 1
            if self.step % self.settings.checkpoint_every == 0:
                self.save()

    def due(self, every: int) -> bool:
        """Whether an update has just ended a stretch of `every` steps, on the process that reports."""
        return self.accelerator.is_main_process and self.accelerator.sync_gradients and self.step % every == 0

    def progress(self) -> dict[str, str]:
        """Loss and pictures per second, for the bar."""
        return {"loss": f"{self.recent_loss():.4f}", "pictures/s": f"{self.rate():.1f}"}

    def recent_loss(self) -> float:
        """Mean loss of the last hundred passes, or of those since `record`.

        Raises:
            FloatingPointError: it is not finite.
        """
        loss = float(torch.stack(self.losses[-100:]).mean())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}; lower learning_rate, or use mixed_precision bf16 or no. "
                f"The last good checkpoint is kept in {self.checkpoints.folder}"
            )
        return loss

    def rate(self) -> float:
        """Pictures per second of all processes, since the first pass of this process."""
        settings = self.settings
        per_step = settings.batch_size * settings.gradient_accumulation_steps * self.accelerator.num_processes
        return (self.step - self.first_step) * per_step / max(time.monotonic() - self.started, 1e-9)

    def record(self, **figures: float) -> None:
        """Append the loss, the rate and `figures` to ``training/metrics.jsonl``."""
        if self.losses:
            figures = {"loss": float(torch.stack(self.losses).mean()), **figures}
        self.losses.clear()
        row = {"step": self.step, "pictures_per_second": round(self.rate(), 2), **figures}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s", row)

    def save(self) -> None:
        """Write a checkpoint of the present step, unless the loss says that the weights are spoilt."""
        if self.losses:
            self.recent_loss()
        self.checkpoints.save(self.step)

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """The network with its averaged weights in place; the trained ones come back afterwards."""
        parameters = list(self.network.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        was_training = self.network.training
        self.network.eval()
        try:
            yield self.network
        finally:
            self.ema.restore(parameters)
            self.network.train(was_training)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While the loop runs, Ctrl-C and SIGTERM ask it to save and stop."""

        def remember(number: int, _frame: Any) -> None:
            self._stop_signal = number

        in_main_thread = threading.current_thread() is threading.main_thread()  # only there can handlers be set
        heard = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        previous = {number: signal.signal(number, remember) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _must_stop(self) -> bool:
        """Whether any process was told to stop, or ran out of time; all processes agree."""
        limit = self.settings.max_minutes
        stop = self._stop_signal is not None or (limit is not None and time.monotonic() - self.started > limit * 60)
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(stop), device=self.device)
            stop = bool(self.accelerator.reduce(flag, "sum") > 0)
        return stop
