"""The objective of a prior: codes from the codes before them, or from those that are not hidden."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Clock
from latentdiff.diffusion.tokens import MaskedOrder
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.objective import Objective, Result


class TokenObjective(Objective[DiffusionBatch]):
    """Cross-entropy of codes, in nats for each. DALL-E (Ramesh et al. 2021), Eq. 1; MaskGIT (Chang et al. 2022), Eq. 1.

    The latents of a batch are codes (B, 1, h, w), and those of the largest noise are hidden.

    Args:
        transformer: called with codes and the arguments of a `Conditioning`.
        order: `RasterOrder` or `MaskedOrder`.
        label_smoothing: share of a target that all codes have, in training.
        values: numbers in the pixels of a code, of which bits are counted.
    """

    def __init__(self, transformer: Any, order: Clock, label_smoothing: float = 0.0, values: int = 1) -> None:
        super().__init__()
        self.transformer, self.order = transformer, order
        self.label_smoothing, self.values = label_smoothing, values

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's loss; ``accuracy``: how often the likeliest is it."""
        losses, found = self._losses(batch, batch.times(self.order), self.label_smoothing)
        loss = (losses * batch.loss_weight).mean()
        return Result(loss, loss.detach(), {"accuracy": found.mean()})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss`` and ``val_accuracy``; in raster order ``val_bits_per_dim``, the codes' likelihood.

        Those are bits for each of a picture's numbers, of its codes alone: what the decoder loses is not in it.
        """
        losses, found = self._losses(batch, batch.times(self.order, held_out=True))
        figures = {"val_loss": losses, "val_accuracy": found}
        if not isinstance(self.order, MaskedOrder):
            figures["val_bits_per_dim"] = losses / (math.log(2) * self.values)
        return Result(losses.mean(), losses.mean().detach(), figures)

    def _losses(self, batch: DiffusionBatch, times: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Of each picture the mean loss of its codes to be found, and the share that was: (B,) float32 each."""
        codes = batch.latents[:, 0].long()  # (B, h, w)
        asked, seen = torch.ones_like(codes, dtype=torch.bool), codes
        if isinstance(self.order, MaskedOrder):
            asked = self.order.hidden(batch.noise, times)[:, 0]
            seen = codes.masked_fill(asked, self.transformer.codes)
        assert isinstance(batch.condition, Conditioning)
        logits = self.transformer(seen, **batch.condition.arguments()).float()  # (B, K, h, w)
        losses = F.cross_entropy(logits, codes, reduction="none", label_smoothing=smoothing)
        found = (logits.argmax(1) == codes).float()
        count = asked.flatten(1).sum(1)
        mean_loss, mean_found = ((one * asked).flatten(1).sum(1) / count for one in (losses, found))
        return mean_loss, mean_found.detach()
