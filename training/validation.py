"""Losses and the like on held-out pictures, with the same noise every time, told apart by bands of timesteps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.diffusion import GaussianDiffusion


class HeldOutLoss:
    """Measures an objective on fixed batches.

    The loss is the plain mean squared error of what the process predicts (noise, v or x_0), whatever weights or bound
    training has, so that runs with the same process can be compared.

    Args:
        process: whose timesteps are divided.
        bands: into how many ranges of equal length.
        names: of the figures that the objective gives of each picture; the first is the loss.
    """

    def __init__(self, process: GaussianDiffusion, bands: int = 4, names: Sequence[str] = ("val_loss",)) -> None:
        if not 1 <= bands <= process.num_timesteps:
            raise ValueError(f"bands must lie in [1, {process.num_timesteps}], not {bands}")
        self.num_timesteps, self.names = process.num_timesteps, names
        self.edges = [process.num_timesteps * i // bands for i in range(bands + 1)]

    @torch.no_grad()
    def __call__(
        self, objective: nn.Module, batches: Sequence[Mapping[str, Any]], accelerator: Accelerator | None = None
    ) -> dict[str, float]:
        """Measure. Each process takes its share of the batches, and all get the result; all must call it.

        Nothing random is drawn, and every module is left in the mode, training or evaluation, in which it was.

        Args:
            objective: a `DenoiserObjective`, as Accelerate has wrapped it or not.
            batches: arguments of its forward, on its device, as `draws` makes them; ``names`` and ``loss_weight``
                count for nothing. The same on every process.
            accelerator: None is one process.

        Returns:
            By name, such as ``val_loss``, the mean over all pictures, and as ``val_loss_<first>_<last>`` that of each
            band of timesteps that has any. Empty without batches.
        """
        rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        sums = torch.zeros(len(self.names) + 1, len(self.edges) - 1, dtype=torch.float64)  # the last: pictures
        modes = {module: module.training for module in objective.modules()}
        objective.eval()
        try:
            # Wrapped modules may talk to the other processes in every forward, so all do equally many.
            for start in range(0, len(batches), count):
                counts = start + rank < len(batches)
                batch = batches[start + rank if counts else 0]
                found = self._measure(objective, batch)
                if counts:
                    self._add(sums, batch["timesteps"].cpu(), found)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if accelerator is not None and count > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return self._figures(sums)

    def _measure(self, objective: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """(names, B) float64, on the CPU"""
        inputs = {key: value for key, value in batch.items() if key != "names"}
        return objective(**inputs, held_out=True).detach().double().cpu().reshape(len(self.names), -1)

    def _add(self, sums: Tensor, timesteps: Tensor, found: Tensor) -> None:
        bands = torch.bucketize(timesteps, torch.tensor(self.edges[1:]), right=True)
        sums.index_add_(1, bands, torch.cat([found, torch.ones_like(found[:1])]))

    def _figures(self, sums: Tensor) -> dict[str, float]:
        *rows, counts = sums.tolist()
        if not sum(counts):
            return {}
        figures = {name: sum(row) / sum(counts) for name, row in zip(self.names, rows, strict=True)}
        for name, row in zip(self.names, rows, strict=True):
            for i, (total, number) in enumerate(zip(row, counts, strict=True)):
                if number:
                    figures[f"{name}_{self.edges[i]}_{self.edges[i + 1] - 1}"] = total / number
        return figures
