"""From what workers have read to what an objective takes."""

import torch

from latentdiff.training.batch.batches import DiffusionBatch, SampleBatch
from latentdiff.training.batch.conditions import ConditionSource
from latentdiff.training.batch.latents import LatentSource


def diffusion_batch(
    samples: SampleBatch, latents: LatentSource, conditions: ConditionSource, device: torch.device
) -> DiffusionBatch:
    """A batch on `device` of samples that these sources have read."""
    return DiffusionBatch(
        latents=latents.latents(samples.pictures, samples.posterior_noise),
        noise=samples.noise.to(device, non_blocking=True),
        draws=samples.draws,
        condition=conditions.condition(samples.captions, device),
        loss_weight=samples.loss_weight.to(device, non_blocking=True),
        names=samples.names,
    )
