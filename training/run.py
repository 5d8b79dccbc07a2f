"""What the trainers share: the loop, the moving average, checkpoints, progress, and stopping in good order."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from latentdiff.training.checkpoints import Checkpoints
from latentdiff.training.config import RunSettings
from latentdiff.training.optimizers import build_optimizer
from latentdiff.training.order import seed_of
from latentdiff.training.processes import accelerator_of, exchange, spread_modules, whole_parameters
from latentdiff.training.watch import LossWatch, name_batch

logger = logging.getLogger(__name__)

MOST_BAD_IN_A_ROW = 20  # with on_bad_loss=skip


class TrainingRun:
    """One run of a trainer.

    Args:
        settings: the run's settings.
        objective: a module whose forward returns a loss. Its parameters that ask for a gradient are trained, averaged
            and kept in checkpoints. Its method ``after_update(sound)``, if it has one, is called after every update:
            whether it was made, or left out because of a bad loss.
        adversary: a module that is trained beside it, with an optimizer of its own. With it, the objective returns its
            loss, the loss to watch (its own may pass through zero), and what the adversary's forward takes to return
            its own loss, or None as long as it waits.
        adversary_rate: its learning rate, where it is not that of the settings.

    The optimizer step counter `step` is what a checkpoint restores. Everything random derives from the seed and the
    step, so a resumed run goes on as if it had never stopped.
    """

    def __init__(
        self,
        settings: RunSettings,
        objective: nn.Module,
        adversary: nn.Module | None = None,
        adversary_rate: float | None = None,
    ) -> None:
        self.settings = settings
        self.folder = Path(settings.output) / "training"
        self.accelerator = accelerator_of(settings)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            settings.save(self.folder / "settings.yaml")
        objective.train()
        optimizer = build_optimizer(settings, [p for p in objective.parameters() if p.requires_grad])
        if settings.compile:
            objective.compile()
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.adversary: Any = None
        if adversary is not None:
            if spread_modules(self.objective):
                raise ValueError("FSDP cannot train against a discriminator; use several processes without FSDP")
            rate = adversary_rate or settings.learning_rate
            opponent = build_optimizer(settings, list(adversary.train().parameters()), rate)
            self.adversary, self.adversary_optimizer = self.accelerator.prepare(adversary, opponent)
            self.rate_ratio = rate / settings.learning_rate
        self.ema: EMAModel | None = None
        if settings.ema_decay > 0:
            least = 0.0 if settings.ema_warmup else settings.ema_decay
            self.ema = EMAModel(self.parameters, decay=settings.ema_decay, min_decay=least, foreach=True)
            self.ema.to(self.accelerator.device)
        self.watch = LossWatch(settings.explosion)
        self.step, self.skipped, self._bad_in_a_row = 0, 0, 0
        self.figures: dict[str, float] = {}
        self.statistics: Callable[[], dict[str, float]] = dict
        """Further figures to be recorded with the loss."""
        self._pass_losses: list[Tensor] = []
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator, settings.keep_checkpoints)
        self._resume()
        self._start_trackers()
        self.started, self.first_step = time.monotonic(), self.step
        self._stop_signal: int | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def update_size(self) -> int:
        """Pictures in one update, of all processes and passes."""
        settings = self.settings
        return settings.batch_size * settings.gradient_accumulation_steps * self.accelerator.num_processes

    def slots(self, number: int) -> range:
        """Which pictures of its update pass `number` of this process trains on."""
        part = number % self.settings.gradient_accumulation_steps * self.accelerator.num_processes
        start = (part + self.accelerator.process_index) * self.settings.batch_size
        return range(start, start + self.settings.batch_size)

    def remaining(self) -> Iterator[int]:
        """Numbers of the forward-backward passes from the present step to `max_steps`, for a loader to prepare."""
        per_step = self.settings.gradient_accumulation_steps
        yield from range(self.step * per_step, self.settings.max_steps * per_step)

    def passes(self) -> Iterator[int]:
        """Numbers of the passes that are left; ends at `max_steps`, at a signal or out of time.

        The trainer's loop body makes one call of `learn` per number.
        """
        per_step = self.settings.gradient_accumulation_steps
        self.started, self.first_step = time.monotonic(), self.step
        self._bar = tqdm(
            total=self.settings.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=2.0,
        )
        with self._signals(), self._bar, logging_redirect_tqdm():
            while self.step < self.settings.max_steps and not self._must_stop():
                first, self.accelerator.step = self.step * per_step, 0  # it counts the passes of an accumulation
                yield from range(first, first + per_step)
                # Only now, so that what the trainer did after the update is done when a checkpoint says so.
                if self.step % self.settings.checkpoint_every == 0:
                    self.save()

    def learn(self, *inputs: Any, names: Sequence[str] = (), **named: Any) -> None:
        """One pass: loss of the objective on `inputs`, gradients, and at the end of an accumulation one update.

        names: of the pictures, for a message.

        Raises:
            FloatingPointError: the loss is bad and ``on_bad_loss`` is "stop", or too many in a row were.
        """
        accelerator = self.accelerator
        # Dropout, if the network has any, is drawn from the step too.
        torch.manual_seed(seed_of(self.settings.seed, self.step, len(self._pass_losses), accelerator.process_index))
        with accelerator.accumulate(self.objective, *([] if self.adversary is None else [self.adversary])):
            loss = self.objective(*inputs, **named)
            if self.adversary is None:
                accelerator.backward(loss)
                self._pass_losses.append(loss.detach())
            else:
                self._pass_losses.append(self._compete(*loss))
            if accelerator.sync_gradients:
                self._update(names)
        if accelerator.sync_gradients:
            self.step += 1
            self._bar.update()
            self._after_update()

    def _update(self, names: Sequence[str]) -> None:
        """Clip, look whether loss and gradient are sound, and change the weights if so."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        if self.adversary is not None:
            self.accelerator.clip_grad_norm_(self.adversary.parameters(), self.settings.max_grad_norm)
        own = torch.stack(self._pass_losses).mean().float()
        self._pass_losses.clear()
        loss = float(self.accelerator.reduce(own, "mean"))
        # In float16 the scaler expects gradients that overflow now and then, and passes over them.
        gradient_norm = 0.0 if norm is None or self.accelerator.scaler is not None else float(norm)
        fault = self.watch.fault(loss, gradient_norm)
        if fault is not None:
            self._report_fault(fault, float(own), names)
            if self.accelerator.scaler is not None:  # it must hear of every update whose gradients it has seen
                self.accelerator.scaler.update()
        else:
            self._bad_in_a_row = 0
            self.watch.add(loss)
            self._change_weights()
        self.optimizer.zero_grad()
        if self.adversary is not None:
            self.adversary_optimizer.zero_grad()
        if fault is None and self.ema is not None:
            self.ema.step(self.parameters)
        after_update = getattr(self.accelerator.unwrap_model(self.objective), "after_update", None)
        if after_update is not None:
            after_update(fault is None)

    def _compete(self, loss: Tensor, watched: Tensor, shown: tuple[Tensor, ...] | None) -> Tensor:
        """Gradients of both sides of a pass; returns the loss to watch, or the one that is not finite."""
        losses = [loss]
        self.accelerator.backward(loss)
        if shown is not None:
            losses.append(self.adversary(*shown))
            self.accelerator.backward(losses[-1])
        return next((bad.detach() for bad in losses if not bad.isfinite()), watched.detach())

    def _change_weights(self) -> None:
        rate = self.settings.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.adversary is None:
            return
        for group in self.adversary_optimizer.param_groups:
            group["lr"] = rate * self.rate_ratio
        if any(parameter.grad is not None for parameter in self.adversary.parameters()):
            self.adversary_optimizer.step()

    def _report_fault(self, fault: str, own_loss: float, names: Sequence[str]) -> None:
        self.skipped += 1
        self._bad_in_a_row += 1
        batch = f"; the last batch of process {self.accelerator.process_index} was {name_batch(names)}" if names else ""
        message = f"{fault} at step {self.step} (of this process alone: {own_loss:.4g}){batch}"
        if self.settings.on_bad_loss == "skip" and self._bad_in_a_row < MOST_BAD_IN_A_ROW:
            logger.warning("%s. The update was left out.", message)
            return
        raise FloatingPointError(
            f"{message}. The weights were not changed by it. Lower learning_rate, use mixed_precision=bf16 or no, look "
            f"at these pictures, or leave such updates out with on_bad_loss=skip. The last good checkpoint is in "
            f"{self.checkpoints.folder}"
        )

    def _after_update(self) -> None:
        settings = self.settings
        if self.due(settings.log_every):
            if self.accelerator.is_main_process:
                self._bar.set_postfix(self.progress())
            rate = settings.learning_rate_at(self.step - 1)
            self.record(**self.watch.report(), learning_rate=rate, **self.statistics())

    def due(self, every: int) -> bool:
        """Whether an update has just ended a stretch of `every` steps, or was the last."""
        return self.accelerator.sync_gradients and (self.step % every == 0 or self.step == self.settings.max_steps)

    def progress(self) -> dict[str, str]:
        """Loss, pictures per second and memory, for the bar, which adds the time left."""
        return {
            "loss": f"{self.watch.mean:.4f}",
            "pictures/s": f"{self.rate():.1f}",
            "memory": f"{memory(self.device) / 2**30:.1f} GiB",
        }

    def rate(self) -> float:
        """Pictures per second of all processes, since the first pass of this process."""
        return (self.step - self.first_step) * self.update_size / max(time.monotonic() - self.started, 1e-9)

    def measured(self, figures: dict[str, float]) -> None:
        """Record figures of the model, and keep them for its card."""
        self.figures = figures
        self.record(**figures)

    def record(self, **figures: float) -> None:
        """Append `figures` to ``training/metrics.jsonl`` and give them to the trackers."""
        if not self.accelerator.is_main_process or not figures:
            return
        row = {"step": self.step, **figures, "pictures_per_second": round(self.rate(), 2), "skipped": self.skipped}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=self.step)

    def show(self, name: str, file: Path) -> None:
        """Give a picture that was written to the trackers that take pictures."""
        import numpy as np
        from PIL import Image

        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({name: [Image.open(file)]}, step=self.step)
            elif tracker.name == "tensorboard":
                array = np.asarray(Image.open(file).convert("RGB"))[None]  # (1, H, W, 3)
                tracker.log_images({name: array}, step=self.step, dataformats="NHWC")

    def save(self, must: bool = False) -> None:
        """Write a checkpoint of the present step.

        A disk that is full does not end a run that goes on: it warns, keeps the older checkpoints and tries again at
        the next one.

        Raises:
            OSError: it cannot be written, and `must` is True.
        """
        ema = self.ema
        state = {
            "watch": self.watch.state(),
            "skipped": self.skipped,
            "figures": self.figures,
            "optimization_step": ema.optimization_step if ema else 0,
        }
        try:
            self.checkpoints.save(self.step, state, ema.shadow_params if ema else [])
        except OSError as error:
            if must:
                raise
            logger.warning("%s. The run goes on; the older checkpoints are kept.", error)

    def _resume(self) -> None:
        """Take over the newest checkpoint, and forget what was recorded after it."""
        state, averaged = self.checkpoints.load_latest()
        if state:
            self.step, self.skipped = int(state["step"]), int(state["skipped"])
            self.watch.restore(state["watch"])
            self.figures = state["figures"]
            if self.ema is not None and averaged:
                self.ema.optimization_step = int(state["optimization_step"])
                for mine, saved in zip(self.ema.shadow_params, averaged, strict=True):
                    (mine.to_local() if hasattr(mine, "to_local") else mine).copy_(saved)
        file = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process and file.is_file():
            rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
            partial = file.with_name(f".partial-{file.name}")
            partial.write_text("".join(row for row in rows if recorded_step(row) <= self.step), encoding="utf-8")
            os.replace(partial, file)

    def _start_trackers(self) -> None:
        if self.settings.report_to:
            config = {key: str(value) for key, value in self.settings.model_dump().items()}
            self.accelerator.init_trackers("latentdiff", config=config)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The objective in evaluation mode with its averaged weights; the trained ones come back afterwards."""
        self._exchange_weights()
        self.objective.eval()
        try:
            with whole_parameters(self.objective):
                yield
        finally:
            self._exchange_weights()
            self.objective.train()

    def _exchange_weights(self) -> None:
        """Trained weights for averaged ones, or back."""
        if self.ema is not None:
            for trained, averaged in zip(self.parameters, self.ema.shadow_params, strict=True):
                if isinstance(trained, DTensor):  # FSDP keeps references to the parts
                    exchange(trained.to_local().detach(), averaged.to_local())
                else:
                    trained.data, averaged.data = averaged.data, trained.data
        for module in spread_modules(self.objective):
            module.reshard()  # or it would go on with the weights that it had gathered

    def end_training(self) -> None:
        """Write the last checkpoint, and let go of what only training needs."""
        self.save(must=True)
        self.optimizer.zero_grad()
        self.optimizer.state.clear()

    @property
    def takes_part(self) -> bool:
        """Whether this process computes what only one reports: the main one, and under FSDP all together."""
        return self.accelerator.is_main_process or bool(spread_modules(self.objective))

    def whole(self, network: Any) -> Any:
        """A network of the objective, to be saved; under FSDP a copy with all of its weights. All must call it.

        network: a model of ours or diffusers'.
        """
        if not spread_modules(self.objective):
            return network
        state = network.state_dict()
        weights = {
            name: part.full_tensor().cpu() if isinstance(part, DTensor) else part for name, part in state.items()
        }
        copy = type(network).from_config(network.config)
        copy.load_state_dict(weights)
        return copy.eval()

    def finish(self) -> None:
        """Wait for the other processes and close the trackers."""
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

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

    @property
    def told_to_stop(self) -> bool:
        """Whether a signal has come."""
        return self._stop_signal is not None

    def _must_stop(self) -> bool:
        """Whether any process was told to stop, or ran out of time; all processes agree."""
        limit = self.settings.max_minutes
        stop = self.told_to_stop or (limit is not None and time.monotonic() - self.started > limit * 60)
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(stop), device=self.device)
            stop = bool(self.accelerator.reduce(flag, "sum") > 0)
        return stop


def recorded_step(row: str) -> float:
    """The step of a row of metrics; infinite for one that a stop has torn."""
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def memory(device: torch.device) -> int:
    """Bytes that this process holds: of the GPU (the most so far) if there is one, else of the main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
