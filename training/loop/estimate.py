"""What a run will take, in plain words: time, memory and disk, measured on its first updates; and dry runs."""

import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from latentdiff.pipelines.distributed import processes
from latentdiff.training.loop.checkpoints import trained_state
from latentdiff.training.loop.distributed import check_surroundings
from latentdiff.training.loop.learner import Learner
from latentdiff.training.loop.records import memory_in_use
from latentdiff.training.settings import RunSettings

logger = logging.getLogger(__name__)

FEW = 8  # pictures that a dry run takes, of each kind
LONG_ENOUGH, MANY_ENOUGH = 10.0, 20  # seconds or updates, after which the pace is known
VERY_LONG = 60.0  # seconds after which it is known by one or two updates
SOON = 60.0  # seconds for samples that are drawn besides the plan: before training, and soon after its beginning
FIRST_LINE, LATER_LINES = 5.0, 30.0  # seconds until the first line about a long work, and between later ones
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
SettingsT = TypeVar("SettingsT", bound=RunSettings)


class DryRunEnd(Exception):  # noqa: N818 - it is no error
    """A dry run has measured what it wanted to; its only argument is what there is to say, as lines."""


def dry_run(train: Callable[[SettingsT], object], settings: SettingsT) -> None:
    """Begin a training without writing into ``settings.output``, and say what all of it would take.

    Pictures are read, networks built, some pictures encoded, a few updates made and samples drawn; a passing folder
    has what is written meanwhile.

    Args:
        train: the trainer of these settings.

    Raises:
        ValueError, FileNotFoundError: what the training itself would raise before its first step.
    """
    check_surroundings(settings)
    state = processes()
    with tempfile.TemporaryDirectory(prefix="latentdiff-dry-run-") as own:
        place = [own]
        if state.num_processes > 1:
            broadcast_object_list(place)  # where all of them share a cache
        try:
            train(settings.in_place(Path(place[0])))
        except DryRunEnd as end:
            for line in end.args[0] if state.is_main_process else ():
                logger.info("%s", line)
        state.wait_for_everyone()


class Pace:
    """How long updates take, without what is done between them. The first counts only if it is alone: it is slower.

    Of few updates it is the median, which one slow one does not change; of many the mean, with all that comes at times.
    """

    def __init__(self, look: float | None = None) -> None:
        self.began = time.monotonic()
        self.updates, self.counted, self.aside, self.total = 0, 0.0, 0.0, 0.0
        self.each: list[float] = []  # seconds of the first ones after the first
        self.look = look  # seconds that the last samples and figures took

    def tick(self, relative_time: float = 1.0) -> None:
        """An update is made. relative_time: that it should have taken; see `Objective`."""
        now = time.monotonic()
        before, self.total = self.total, now - self.began - self.aside
        self.updates += 1
        if self.updates == 1:
            self.first, self.began, self.aside, self.total = self.total / relative_time, now, 0.0, 0.0
        else:
            self.counted += relative_time
            if self.updates <= MANY_ENOUGH:
                self.each.append((self.total - before) / relative_time)

    def looked(self, seconds: float, share: float) -> None:
        """Samples and figures, or a share of them, took so long; it is not the updates' time."""
        if share:
            self.look = seconds / share
        self.aside += seconds

    @property
    def is_known(self) -> bool:
        if self.updates > 3:  # three without the first, so that a slow one is not the median
            return self.total > LONG_ENOUGH or self.updates > MANY_ENOUGH
        return self.updates > 1 and self.total > VERY_LONG

    @property
    def seconds(self) -> float:
        """Of one update."""
        if self.updates == 1:
            return self.first
        return self.total / self.counted if self.updates > MANY_ENOUGH else statistics.median(self.each)


def looks(settings: RunSettings, step: int) -> int:
    """How often samples are drawn between `step` and the end, which counts."""
    whole = settings.max_steps // settings.sample_every - step // settings.sample_every
    return whole + (settings.max_steps % settings.sample_every > 0)


def time_needed(pace: Pace, steps: int, looks: int, short: int = 0) -> float:
    """Seconds for what is left. short: looks of at most `SOON`."""
    look = pace.look or 0.0
    return steps * pace.seconds + looks * look + short * min(look, SOON)


def time_line(pace: Pace, steps: int, looks: int, short: int = 0) -> str:
    """steps, looks, short: see `time_needed`; the short ones are before training."""
    needed, long = time_needed(pace, steps, looks, short), (pace.look or 0.0) > SOON
    more = "; those before training a minute at the most" if long and short else ""
    looks += 0 if long else short
    each = f"of {duration(pace.look)} each" if pace.look is not None else "not counted"
    return (
        f"Time: about {duration(needed)} for {steps:,} steps of "
        f"{duration(pace.seconds)}, with samples and figures {looks} time{'s' * (looks != 1)} ({each}{more})."
    )


def limit_lines(settings: RunSettings, step: int, needed: float, left: float) -> Iterator[str]:
    """How far a run gets that is limited in time.

    needed, left: seconds from `step` to the end, and until the limit.
    """
    if left < needed:
        reached = step + int((settings.max_steps - step) * max(0.0, left) / needed)
        yield (
            f"max_minutes={settings.max_minutes:g} stops it before that: in about {duration(max(0.0, left))}, near "
            f"step {reached:,} of {settings.max_steps:,}. The rest takes {duration(needed - left)}, by the same "
            f"command."
        )


def memory_line(device: torch.device) -> str:
    held = size(memory_in_use(device))
    if device.type == "cuda":
        return f"Memory: {held} of the GPU's {size(torch.cuda.get_device_properties(device).total_memory)} at the most."
    return f"Memory: this process holds {held}; the machine has {size(psutil.virtual_memory().total)}."


def disk_lines(settings: RunSettings, checkpoint: int, model: int) -> Iterator[str]:
    """checkpoint, model: bytes of one, and of what is saved at the end (0: not known)."""
    kept = min(settings.keep_checkpoints, settings.max_steps // settings.checkpoint_every + 1)
    needed, free = (kept + 1) * checkpoint + model, shutil.disk_usage(existing(Path(settings.output))).free
    parts = f"{kept} checkpoint{'s' * (kept > 1)} of {size(checkpoint)}, one more while it is written"
    whole = f", the model of {size(model)}" if model else ""
    yield (
        f"Disk: about {size(needed)} in {settings.output} ({parts}{whole}); {size(free)} are free there. Samples, and "
        f"the cache of what is encoded ('latentdiff cache'), are not counted."
    )
    if needed > free:
        yield "That is more than is free: make room, choose another --output, or fewer keep_checkpoints."


def checkpoint_bytes(learner: Learner) -> int:
    """What a checkpoint has now: trained weights, their average, and the optimizers' memory."""
    modules = [learner.plain, *([learner.adversary.plain] if learner.adversary else [])]
    optimizers = [learner.optimizer, *([learner.adversary.optimizer] if learner.adversary else [])]
    tensors = [tensor for module in modules for tensor in trained_state(module).values()]
    states = [state.values() for optimizer in optimizers for state in optimizer.state.values()]
    tensors += [value for values in states for value in values if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*tensors, *learner.averages])


def module_bytes(*modules: object) -> int:
    """Of the weights of those that are networks."""
    networks = [module for module in modules if isinstance(module, nn.Module)]
    return sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.exists())


class ProgressLines:
    """Says now and then how much of a work is done and how long the rest takes, where no bar shows it.

    Args:
        total: of the work.
        what: is done, such as "pictures encoded".
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done = total, what, 0
        self.began, self.due = time.monotonic(), FIRST_LINE

    def update(self, count: int, says: bool) -> None:
        """Count what was done; says: whether this is where lines are wanted."""
        self.done += count
        passed = time.monotonic() - self.began
        if says and self.done < self.total and passed >= self.due:
            left = duration(passed / self.done * (self.total - self.done))
            logger.info("%d of %d %s, about %s left", self.done, self.total, self.what, left)
            self.due = passed + LATER_LINES


def duration(seconds: float) -> str:
    """A time as people say it, such as "40 seconds" or "3 h 20 min"."""
    if seconds < 9.5:
        return f"{seconds:.2g} seconds"
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} minutes"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 72 else f"{hours / 24:.1f} days"


def size(count: float) -> str:
    """A number of bytes, such as "34.1 MiB"."""
    for unit in UNITS[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} {UNITS[-1]}"
