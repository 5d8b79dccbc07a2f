"""Losses and other figures of held-out pictures, with the same noise every time, also by bands of timesteps."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.diffusion.process import Process
from latentdiff.training.batch.batch_types import DiffusionBatch


class HeldOutLoss:
    """Measures an objective on fixed batches.

    The loss is the plain mean squared error of what the process predicts (noise, v or x_0), whatever weights or bound
    training has, so that runs with the same process can be compared.

    Args:
        process: whose timesteps are divided.
        bands: into how many ranges of equal length.
    """

    def __init__(self, process: Process, bands: int = 4) -> None:
        if not 1 <= bands <= process.num_timesteps:
            raise ValueError(f"bands must lie in [1, {process.num_timesteps}], not {bands}")
        self.process = process
        self.edges = [process.num_timesteps * i // bands for i in range(bands + 1)]

    @torch.no_grad()
    def __call__(
        self, objective: Any, batches: Sequence[DiffusionBatch], accelerator: Accelerator | None = None
    ) -> dict[str, float]:
        """Measure. Each process takes its share of the batches, and all get the result; all must call it.

        Nothing random is drawn, and every module is left in the mode, training or evaluation, in which it was.

        Args:
            objective: an `Objective` with a held-out loss, as Accelerate has wrapped it or not.
            batches: on its device, the same on every process.
            accelerator: None is one process.

        Returns:
            By name, such as ``val_loss``, the mean over all pictures, and as ``val_loss_<first>_<last>`` that of each
            band of timesteps that has any. Empty without batches.
        """
        rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        names: tuple[str, ...] = ()
        sums = torch.zeros(0)  # (figures and the number of pictures, bands)
        modes = {module: module.training for module in objective.modules()}
        objective.eval()
        try:
            # Wrapped modules may talk to the other processes in every forward, so all do equally many.
            for start in range(0, len(batches), count):
                counts = start + rank < len(batches)
                batch = batches[start + rank if counts else 0]
                figures = objective(batch, held_out=True).figures
                if not names:
                    names = tuple(figures)
                    sums = torch.zeros(len(names) + 1, len(self.edges) - 1, dtype=torch.float64)
                if counts:
                    self._add(sums, batch, torch.stack([figures[name].double().cpu() for name in names]))
        finally:
            for module, mode in modes.items():
                module.training = mode
        if accelerator is not None and count > 1 and names:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return self._means(names, sums)

    def _add(self, sums: Tensor, batch: DiffusionBatch, found: Tensor) -> None:
        """found: (figures, B)"""
        times = self.process.model_time(batch.times(self.process)).cpu()
        bands = torch.bucketize(times, torch.tensor(self.edges[1:]), right=True)
        sums.index_add_(1, bands, torch.cat([found, torch.ones_like(found[:1])]))

    def _means(self, names: Sequence[str], sums: Tensor) -> dict[str, float]:
        if not names:
            return {}
        *rows, counts = sums.tolist()
        means = {name: sum(row) / sum(counts) for name, row in zip(names, rows, strict=True)}
        for name, row in zip(names, rows, strict=True):
            for i, (total, number) in enumerate(zip(row, counts, strict=True)):
                if number:
                    means[f"{name}_{self.edges[i]}_{self.edges[i + 1] - 1}"] = total / number
        return means
