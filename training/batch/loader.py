"""Batches for the passes that a run still has to do, read by workers ahead of time."""

import signal
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from latentdiff.training.batch.choices import Place
from latentdiff.training.loop.order import PictureOrder
from latentdiff.training.loop.run import TrainingRun

Sample = TypeVar("Sample")
Batch = TypeVar("Batch")


def batches(
    run: TrainingRun, order: PictureOrder, samples: Dataset[Sample], stack: Callable[[list[Sample]], Batch]
) -> Iterator[Batch]:
    """A batch for every pass of this process that the run still has to do; ends when the run must stop."""
    loader = DataLoader(
        samples,
        batch_sampler=places(run, order),
        collate_fn=stack,
        num_workers=run.settings.num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory=run.device.type == "cuda",
    )
    try:  # passes() comes first: when it ends, no further batch is read.
        for _, batch in zip(run.passes(), loader, strict=False):
            yield batch
    except RuntimeError:
        if not run.stopping.requested:  # a signal to the whole group ends the workers
            raise


def places(run: TrainingRun, order: PictureOrder) -> Iterator[list[Place]]:
    """What the remaining passes of this process train on."""
    per_step = run.settings.gradient_accumulation_steps
    for number in run.remaining():
        step = number // per_step
        indices = order.update(step)
        yield [Place(step, slot, indices[slot]) for slot in run.slots(number)]


def leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C reaches the workers too; the main process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
