"""Samples and batches of a diffusion training, from its source of latents and its source of conditions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentdiff.codec import Codec
from latentdiff.training.batch.batch_types import DiffusionBatch, SampleBatch
from latentdiff.training.batch.choices import ViewChoice
from latentdiff.training.batch.conditions import ConditionSource
from latentdiff.training.batch.latents import LatentSource
from latentdiff.training.batch.samples import DiffusionSamples, chunks_alike, held_out_samples
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.settings import DiffusionSettings


@dataclass(frozen=True)
class Reader:
    """Both sources together.

    Args:
        update_size: pictures in one update.
        device: of the batches.
    """

    settings: DiffusionSettings
    codec: Codec
    latents: LatentSource
    conditions: ConditionSource
    update_size: int
    device: torch.device

    @property
    def idle(self) -> tuple[Any, ...]:
        """Networks that training does not need, as caches take their place."""
        return self.latents.idle + self.conditions.idle

    def samples(self, pictures: Sequence[CaptionedPicture], views: ViewChoice) -> DiffusionSamples:
        """For a data loader; it holds what reads, and no network."""
        return DiffusionSamples(
            self.settings,
            pictures,
            views,
            self.latents.read,
            self.conditions.read,
            latent_channels=self.codec.channels,
            factor=self.codec.factor,
            update_size=self.update_size,
        )

    def batch(self, samples: SampleBatch) -> DiffusionBatch:
        """What an objective takes, of samples that were read."""
        return DiffusionBatch(
            latents=self.latents.latents(samples.pictures, samples.posterior_noise),
            noise=samples.noise.to(self.device, non_blocking=True),
            draws=samples.draws,
            condition=self.conditions.condition(samples.captions, self.device),
            loss_weight=samples.loss_weight.to(self.device, non_blocking=True),
            names=samples.names,
        )

    def held_out(self, pictures: Sequence[CaptionedPicture], views: ViewChoice, bands: int) -> list[DiffusionBatch]:
        """Fixed batches, with times spread evenly over each of `bands` bands."""
        chosen = held_out_samples(self.samples(pictures, views), bands)
        return [self.batch(SampleBatch.stack(chunk)) for chunk in chunks_alike(chosen)]
