"""The objective of a classifier of noisy pictures. ADM (Dhariwal & Nichol 2021)."""

import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.objective import Objective, Result


class ClassifierObjective(Objective[DiffusionBatch]):
    """Cross-entropy of the class, in nats, of pictures with noise as the process mixes it in. ADM, Sec. 4.3.

    Args:
        classifier: called with (noisy latents, timesteps).
        process: that of the model to be guided.
    """

    def __init__(self, classifier: nn.Module, process: Process) -> None:
        super().__init__()
        self.classifier, self.process = classifier, process

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's loss."""
        losses, _ = self._losses(batch)
        loss = (losses * batch.loss_weight).mean()
        return Result(loss, loss.detach(), {})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``, and ``val_accuracy``: whether the class was found."""
        losses, found = self._losses(batch)
        return Result(losses.mean(), losses.mean().detach(), {"val_loss": losses, "val_accuracy": found.to(losses)})

    def _losses(self, batch: DiffusionBatch) -> tuple[Tensor, Tensor]:
        """Of each picture the loss, (B,) float32, and whether its class is the likeliest, (B,) bool."""
        assert isinstance(batch.condition, Conditioning)
        labels = batch.condition.labels
        assert labels is not None
        times = batch.times(self.process)
        noisy = self.process.mix(batch.latents, batch.noise, times)
        logits = self.classifier(noisy, self.process.model_time(times))
        return F.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(1) == labels
