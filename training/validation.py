"""The loss on held-out pictures, with the same noise every time, told apart by bands of timesteps."""

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
    """

    def __init__(self, process: GaussianDiffusion, bands: int = 4) -> None:
        if not 1 <= bands <= process.num_timesteps:
            raise ValueError(f"bands must lie in [1, {process.num_timesteps}], not {bands}")
        self.num_timesteps = process.num_timesteps
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
            ``val_loss``, the mean over all pictures, and ``val_loss_<first>_<last>`` for each band of timesteps that
            has any. Empty without batches.
        """
        rank, count = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        sums = torch.zeros(2, len(self.edges) - 1, dtype=torch.float64)  # losses, pictures
        modes = {module: module.training for module in objective.modules()}
        objective.eval()
        try:
            # Wrapped modules may talk to the other processes in every forward, so all do equally many.
            for start in range(0, len(batches), count):
                counts = start + rank < len(batches)
                batch = batches[start + rank if counts else 0]
                losses = self._losses(objective, batch)
                if counts:
                    self._add(sums, batch["timesteps"].cpu(), losses)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if accelerator is not None and count > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        return self._figures(sums)

    def _losses(self, objective: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """(B,) float64, on the CPU"""
        inputs = {key: value for key, value in batch.items() if key != "names"}
        return objective(**inputs, held_out=True).detach().double().cpu()

    def _add(self, sums: Tensor, timesteps: Tensor, losses: Tensor) -> None:
        bands = torch.bucketize(timesteps, torch.tensor(self.edges[1:]), right=True)
        sums[0].index_add_(0, bands, losses)
        sums[1].index_add_(0, bands, torch.ones_like(losses))

    def _figures(self, sums: Tensor) -> dict[str, float]:
        losses, counts = sums.tolist()
        if not sum(counts):
            return {}
        figures = {"val_loss": sum(losses) / sum(counts)}
        for i, (loss, number) in enumerate(zip(losses, counts, strict=True)):
            if number:
                figures[f"val_loss_{self.edges[i]}_{self.edges[i + 1] - 1}"] = loss / number
        return figures
