"""One run of a trainer: its steps, its checkpoints, and what it records."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from latentdiff.interchange.adapter_files import save_whole
from latentdiff.training.batch.batch_types import NamedBatch
from latentdiff.training.loop import estimate
from latentdiff.training.loop.checkpoints import Checkpoints
from latentdiff.training.loop.distributed import accelerator_of, log_start, spread_modules, whole_parameters
from latentdiff.training.loop.estimate import SOON, duration
from latentdiff.training.loop.learner import Learner
from latentdiff.training.loop.optimizers_and_schedules import learning_rate_at
from latentdiff.training.loop.output_folder import hold, log_changes, open_output, places_of, release, state_of
from latentdiff.training.loop.power_averages import AVERAGES
from latentdiff.training.loop.records import Records, memory_in_use
from latentdiff.training.loop.stopping import Stopping
from latentdiff.training.objectives.objective import Objective, RealAndFake
from latentdiff.training.settings import RunSettings

logger = logging.getLogger(__name__)

SHORT = 60.0  # seconds of a run, about which nothing is said beforehand


class TrainingRun:
    """One run of a trainer.

    The optimizer step counter `step` is what a checkpoint restores. Everything random derives from the seed and the
    step, so a resumed run goes on as if it had never stopped.

    Args:
        settings: the run's settings.
        objective, adversary, adversary_rate: see `Learner`.
        given: digests, by name, of what is not trained and not in the settings; an unfinished run goes on with the same
            only.
    """

    def __init__(
        self,
        settings: RunSettings,
        objective: Objective[Any],
        adversary: Objective[RealAndFake] | None = None,
        adversary_rate: float | None = None,
        given: Mapping[str, str] | None = None,
    ) -> None:
        self.settings, self.given = settings, dict(given or {})
        self.folder = settings.folder
        open_output(settings, given)
        self.accelerator = accelerator_of(settings)
        checkpoints = Path(settings.output) / "training" / "checkpoints"
        self.learner = Learner(self.accelerator, settings, objective, adversary, adversary_rate, checkpoints)
        self.step = 0
        self.figures: dict[str, float] = {}  # of the model, the last ones measured
        self.history: list[dict[str, Any]] = []  # of settings that changed: when, step, setting, old, new
        self.looked_at = -1  # the step of the last samples
        self.model_bytes = 0  # of what will be saved at the end, where the trainer says so
        self.shown_share = 1.0  # of the samples, that were drawn last
        self.draws_before = False  # whether samples are drawn before training too
        self.pace, self._estimated = estimate.Pace(), False
        self.checkpoints = Checkpoints(checkpoints, self.accelerator, settings.keep_checkpoints)
        self._resume()
        if self.accelerator.is_main_process:  # only now, when nothing is refused any more
            self.folder.mkdir(parents=True, exist_ok=True)
            if not settings.is_dry_run:
                hold(self.folder)
            settings.save(self.folder / "settings.yaml", self.history)
            log_start(self.accelerator, settings)
        self.records = Records(self.folder, self.accelerator, settings, self.step)
        self.stopping = Stopping(self.accelerator, settings.max_minutes)
        self.stopping.has_shown |= any((self.folder / "samples").glob("step-*.png"))
        self.started, self.first_step = time.monotonic(), self.step

    @property
    def objective(self) -> Any:
        """The objective, as Accelerate has wrapped it."""
        return self.learner.objective

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    # Passes and updates

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

        Raises:
            DryRunEnd: of a dry run, once it has been measured.
        """
        per_step = self.settings.gradient_accumulation_steps
        self.started, self.first_step = time.monotonic(), self.step
        self.stopping.started, self.pace = self.started, estimate.Pace(self.pace.look)
        self._bar = tqdm(
            total=self.settings.max_steps,
            initial=self.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=2.0,
        )
        with self.stopping.signals(), self._bar, logging_redirect_tqdm():
            while self.step < self.settings.max_steps and not self.stopping.must_stop():
                if self.settings.is_dry_run and self.looked_at >= 0:
                    break
                first, self.accelerator.step = self.step * per_step, 0  # it counts the passes of an accumulation
                yield from range(first, first + per_step)
                # Only now, so that what the trainer did after the update is done when a checkpoint says so.
                if self.step % self.settings.checkpoint_every == 0 and not self.settings.is_dry_run:
                    self.save()
        if self.settings.is_dry_run:
            raise estimate.DryRunEnd(self.estimated())

    def learn(self, batch: NamedBatch) -> dict[str, float]:
        """One pass on `batch`, and at the end of an accumulation one update; see `Learner.learn`.

        Returns:
            The objectives' figures, where they were recorded after it; otherwise nothing.
        """
        if not self.learner.learn(batch, self.step):
            return {}
        self.pace.tick(self.learner.plain.relative_time(self.step))
        self.step += 1
        self._bar.update()
        self._say_estimate()
        self._keep_averages()
        if not self.due(self.settings.log_every):
            if self.step == 1:  # so that the curves of a run that is stopped early begin somewhere
                self._record_now()
            return {}
        if self.accelerator.is_main_process:
            self._bar.set_postfix(self.progress())
        figures = self.learner.figures()
        rate = learning_rate_at(self.settings, self.step - 1)
        self.record(**self.learner.watch.report(), learning_rate=rate, **figures)
        return figures

    def _record_now(self) -> None:
        """Loss so far and learning rate, besides the plan of records, which goes on as if there were none."""
        rate = learning_rate_at(self.settings, self.step - 1)
        self.record(**self.learner.watch.so_far(), learning_rate=rate, **self.learner.figures())

    def due(self, every: int) -> bool:
        """Whether an update has just ended a stretch of `every` steps, or was the last."""
        return self.accelerator.sync_gradients and (self.step % every == 0 or self.step == self.settings.max_steps)

    def is_to_look(self) -> bool:
        """Whether to draw samples and measure on held-out pictures after this pass: as often as the settings say, once
        soon after the beginning, and once in a dry run."""
        if not self.accelerator.sync_gradients:
            return False
        measured = self.settings.is_dry_run and self.pace.is_known
        return self.due(self.settings.sample_every) or self.stopping.is_to_show or measured

    @property
    def has_stopped_unseen(self) -> bool:
        """Whether the present weights come of updates, and none has looked at them, in this sitting or another."""
        return 0 < self.step != self.looked_at and not self.records.sheet(self.step).exists()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within, the averaged weights are in place, and time does not count as that of updates."""
        began = time.monotonic()
        self._bar.set_description("drawing samples")
        with self.averaged():
            yield
        self._bar.set_description()
        self.looked_at, self.stopping.has_shown = self.step, True
        self.pace.looked(time.monotonic() - began, self.shown_share)

    def show_at_stop(self, draw: Callable[[], object]) -> None:
        """Draw samples of the weights at which the run has stopped, if there are none, now that all is saved."""
        if self.has_stopped_unseen:
            self.show_besides(draw)

    def show_besides(self, draw: Callable[[], object]) -> None:
        """Draw samples before training, or after it."""
        if self.accelerator.is_main_process:
            look = self.pace.look
            how_long = "a minute at the most" if look is None else f"about {duration(min(look, SOON))}"
            logger.info("drawing samples of step %d (%s); Ctrl-C leaves them out", self.step, how_long)
        began = time.monotonic()
        self.stopping.at_leisure(draw, at_stop=True)
        self.pace.looked(time.monotonic() - began, self.shown_share)

    def estimated(self) -> list[str]:
        """Lines about the time, memory and disk that the rest of the run takes."""
        step = self.first_step if self.settings.is_dry_run else self.step
        left = (self.pace, self.settings.max_steps - step, estimate.looks(self.settings, step))
        short = int(self.settings.is_dry_run and self.draws_before and step == 0)
        passed = 0.0 if self.settings.is_dry_run else time.monotonic() - self.started
        seconds = math.inf if self.settings.max_minutes is None else 60 * self.settings.max_minutes - passed
        return [
            estimate.time_line(*left, short),
            *estimate.limit_lines(self.settings, step, estimate.time_needed(*left), seconds),
            estimate.memory_line(self.device),
            *estimate.disk_lines(self.settings, estimate.checkpoint_bytes(self.learner), self.model_bytes),
        ]

    def _say_estimate(self) -> None:
        """Once, when the pace is known, unless it is nearly over."""
        if self._estimated or not self.pace.is_known or self.settings.is_dry_run:
            return
        self._estimated = True
        if self.accelerator.is_main_process and self.pace.seconds * (self.settings.max_steps - self.step) > SHORT:
            for line in self.estimated():
                logger.info("%s", line)

    # Records

    def progress(self) -> dict[str, str]:
        """Loss, pictures per second and memory, for the bar, which adds the time left."""
        return {
            "loss": f"{self.learner.watch.mean:.4f}",
            "pictures/s": f"{self.rate():.1f}",
            "memory": f"{memory_in_use(self.device) / 2**30:.1f} GiB",
        }

    def rate(self) -> float:
        """Pictures per second of all processes, since the first pass of this process."""
        return (self.step - self.first_step) * self.update_size / max(time.monotonic() - self.started, 1e-9)

    def measured(self, figures: dict[str, float]) -> None:
        """Record figures of the model, and keep them for its card."""
        self.figures = figures
        self.record(**figures)
        self.records.draw_curves()

    def record(self, **figures: float) -> None:
        """Write `figures` down, with the speed and the number of updates that were left out."""
        if figures:
            more = {"pictures_per_second": round(self.rate(), 2), "skipped": self.learner.skipped}
            self.records.add(self.step, {**figures, **more})

    def show(self, name: str, picture: Image.Image) -> None:
        """Keep a picture of the present step in ``samples``, and give it to the trackers that take pictures."""
        self.records.show(self.step, name, picture)

    # Checkpoints

    def save(self, must: bool = False) -> None:
        """Write a checkpoint of the present step.

        A disk that is full does not end a run that goes on: it warns, keeps the older checkpoints and tries again at
        the next one.

        Raises:
            OSError: it cannot be written, and `must` is True.
        """
        state = {
            "watch": self.learner.watch.state(),
            "skipped": self.learner.skipped,
            "figures": self.figures,
            "optimization_step": self.learner.average.updates,
            "power_updates": 0 if self.learner.powers is None else self.learner.powers.updates,
            "settings": state_of(self.settings),
            "chosen": self.settings.given,
            "places": places_of(state_of(self.settings)),
            "given": self.given,
            "history": self.history,
        }
        try:
            self.checkpoints.save(self.step, state, self.learner.averages)
        except OSError as error:
            if must:
                raise
            logger.warning("%s. The run goes on; the older checkpoints are kept.", error)

    def _keep_averages(self) -> None:
        """Write the averages from which `latentdiff average` makes others, as often as the settings say.

        What cannot be written is missing later, and does not end the run.
        """
        powers, every = self.learner.powers, self.settings.ema_snapshots
        if powers is None or not self.due(every) or self.settings.is_dry_run or not self.accelerator.is_main_process:
            return
        for tensors, header in powers.files():
            file = self.folder / AVERAGES / f"step-{self.step:08d}-{header['length']}.safetensors"
            try:
                save_whole(tensors, file, {"format": "pt", **header})
            except OSError as error:
                logger.warning("%s could not be written (%s). The run goes on without it.", file, error.strerror)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        state, averaged = self.checkpoints.load_latest()
        if state:
            changed = log_changes(state, self.settings)
            self.history = [*state.get("history", []), *changed]
            self.step, self.learner.skipped = int(state["step"]), int(state["skipped"])
            self.learner.watch.restore(state["watch"])
            self.figures = state["figures"]
            updates = (int(state["optimization_step"]), int(state.get("power_updates", 0)))
            self.learner.restore_averages(averaged, *updates)

    # The trained networks

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
        self.learner.average.exchange()
        for module in spread_modules(self.objective):
            module.reshard()  # or it would go on with the weights that it had gathered

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

    # The end

    def end_training(self) -> None:
        """Write the last checkpoint, record where the losses are, and free what only training needs."""
        self.save(must=True)
        if self.first_step < self.step < self.settings.max_steps and self.step % self.settings.log_every:
            self._record_now()
        self.learner.optimizer.zero_grad()
        self.learner.optimizer.state.clear()

    def finish(self) -> None:
        """Wait for the other processes, close the trackers, let others train into the folder, and say if it stopped.

        Raises:
            KeyboardInterrupt: Ctrl-C has stopped the run; all is saved.
            SystemExit: so has another signal; its code is 128 and the signal's number, as shells have it.
        """
        self.accelerator.wait_for_everyone()
        self.records.close()
        release(self.folder)
        if self.step >= self.settings.max_steps:
            return
        if self.accelerator.is_main_process:
            logger.warning(
                "Stopped by %s at step %d of %d. Repeat the command to go on from there; until then %s holds the model "
                "as it is now, unfinished.",
                *(self.stopping.reason, self.step, self.settings.max_steps, self.settings.output),
            )
        self.stopping.leave()
