"""From the data order to batches: what a data loader's workers read ahead, and what is made of it for an objective."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.codec import Codec
from latentdiff.training.batch.batch_types import Batch, DiffusionBatch, PixelBatch, ReadCaptions, SampleBatch
from latentdiff.training.batch.conditions import ConditionSource
from latentdiff.training.batch.latents import LatentSource, PictureView, read_view
from latentdiff.training.batch.random_choices import (
    POSTERIOR,
    SAMPLE,
    CaptionChoice,
    PictureOrder,
    Place,
    ViewChoice,
    generator_of,
    seed_of,
    time_draw,
)
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.captioned_picture import View
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings, RunSettings

AnyBatch = TypeVar("AnyBatch", bound=Batch)

HELD_OUT, CHUNK = 32, 16  # pictures that are held out at most, and samples in a batch of them
HELD_OUT_SEEDS = 1 << 40  # where the seeds of held-out pictures begin


def batches(
    run: TrainingRun,
    order: PictureOrder,
    samples: Dataset[AnyBatch],
    cat: Callable[[list[AnyBatch]], AnyBatch],
    batch_of: Callable[[int], int] = int,
) -> Iterator[AnyBatch]:
    """A batch for every pass of this process that the run still has to do; ends when the run must stop.

    Args:
        samples: by `Place`, each a batch of one, which `cat` joins.
        batch_of: see `Objective`.
    """
    loader = DataLoader(
        samples,
        batch_sampler=places(run, order, batch_of),
        collate_fn=cat,
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


def places(run: TrainingRun, order: PictureOrder, batch_of: Callable[[int], int]) -> Iterator[list[Place]]:
    """What the remaining passes of this process train on."""
    per_step = run.settings.gradient_accumulation_steps
    for number in run.remaining():
        step = batch_of(number // per_step)
        indices = order.update(step)
        yield [Place(step, slot, indices[slot]) for slot in run.slots(number)]


def leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C and the terminal's end reach the workers too; the main process decides when they end."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@dataclass(frozen=True)
class PixelSamples(Dataset[PixelBatch]):
    """Pictures for an autoencoder, each as a batch of one."""

    settings: RunSettings
    pictures: Sequence[CaptionedPicture]
    views: ViewChoice

    def __getitem__(self, place: Place) -> PixelBatch:
        generator = generator_of(self.settings.seed, SAMPLE, place.step, place.slot)
        view = self.views.pick(place.index, torch.rand(3, generator=generator))
        picture = self.pictures[place.index]
        seed = seed_of(self.settings.seed, POSTERIOR, place.step, place.slot)
        return PixelBatch(read_view((picture, view))[None], (seed,), place.step, (picture.name,))


@dataclass(frozen=True)
class DiffusionSamples(Dataset[SampleBatch]):
    """What denoisers and classifiers learn from: latents or pixels, noise, a draw of the timestep, and a condition.

    Each is a batch of one.

    Args:
        read_picture, read_captions: see `LatentSource.read` and `ConditionSource.read`.
        latent_channels, factor: of the autoencoder.
        update_size: pictures in one update, over which timesteps are spread evenly.
        tells_sizes: see `ConditionSource`.
        read_mask: gives the mask of a view, (1, h, w); None: the loss looks at whole pictures.
    """

    settings: DiffusionSettings
    pictures: Sequence[CaptionedPicture]
    views: ViewChoice
    read_picture: Callable[[PictureView], Tensor]
    read_captions: Callable[[tuple[str, ...]], ReadCaptions]
    latent_channels: int
    factor: int
    update_size: int
    tells_sizes: bool = False
    read_mask: Callable[[PictureView], Tensor] | None = None

    def __getitem__(self, place: Place) -> SampleBatch:
        generator = generator_of(self.settings.seed, SAMPLE, place.step, place.slot)
        uniform = torch.rand(7, generator=generator)
        picture = self.pictures[place.index]
        caption = CaptionChoice(self.settings).pick(picture.captions, uniform[:3])
        view = self.views.pick(place.index, uniform[3:6])
        draw = time_draw(self.settings, place, self.update_size, float(uniform[6]))
        return self.sample(picture, view, caption, draw, generator)

    def sample(
        self, picture: CaptionedPicture, view: View, caption: str, draw: float, generator: torch.Generator
    ) -> SampleBatch:
        """A picture's turn with these choices; the noise comes from `generator`."""
        shape = (self.latent_channels, view.height // self.factor, view.width // self.factor)
        posterior_noise = torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        if self.settings.noise_offset:  # so that a whole picture can become lighter or darker
            noise = noise + self.settings.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        return SampleBatch(
            self.read_picture((picture, view))[None],
            self.read_captions((caption,)),
            posterior_noise[None],
            noise[None],
            torch.tensor([draw], dtype=torch.float64),
            torch.tensor([picture.loss_weight]),
            (picture.name,),
            torch.tensor([view.told(picture)], dtype=torch.float32) if self.tells_sizes else None,
            None if self.read_mask is None else self.read_mask((picture, view))[None].float(),
        )


@dataclass(frozen=True)
class Reader:
    """Makes samples and batches of a diffusion training, from its source of latents and its source of conditions.

    Args:
        update_size: pictures in one update.
        device: of the batches.
        masks: see `DiffusionSamples.read_mask`.
    """

    settings: DiffusionSettings
    codec: Codec
    latents: LatentSource
    conditions: ConditionSource
    update_size: int
    device: torch.device
    masks: Callable[[PictureView], Tensor] | None = None

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
            self.codec.channels,
            self.codec.factor,
            self.update_size,
            self.conditions.tells_sizes,
            self.masks,
        )

    def batch(self, samples: SampleBatch) -> DiffusionBatch:
        """What an objective takes, of samples that were read."""
        condition = self.conditions.condition(samples.captions, self.device)
        if samples.time_ids is not None:
            condition = self.conditions.tell(condition, samples.time_ids.to(self.device, non_blocking=True))
        return DiffusionBatch(
            latents=self.latents.latents(samples.pictures, samples.posterior_noise),
            noise=samples.noise.to(self.device, non_blocking=True),
            draws=samples.draws,
            condition=condition,
            loss_weight=samples.loss_weight.to(self.device, non_blocking=True),
            names=samples.names,
            mask=None if samples.mask is None else samples.mask.to(self.device, non_blocking=True),
        )

    def held_out(self, pictures: Sequence[CaptionedPicture], views: ViewChoice, bands: int) -> list[DiffusionBatch]:
        """Fixed batches, each of one size of latents, with times spread evenly over each of `bands` bands."""
        samples, count = self.samples(pictures, views), min(HELD_OUT, len(pictures))
        by_shape: dict[torch.Size, list[SampleBatch]] = {}
        for i, picture in enumerate(pictures[:count]):
            for band in range(bands):
                generator = generator_of(HELD_OUT_SEEDS, i, band)
                draw = (band + (i + 0.5) / count) / bands
                sample = samples.sample(picture, views.centred(i), picture.captions[0], draw, generator)
                if sample.mask is None or bool(sample.mask.any()):  # or there is nothing to measure
                    by_shape.setdefault(sample.noise.shape, []).append(sample)
        chunks = [alike[at : at + CHUNK] for alike in by_shape.values() for at in range(0, len(alike), CHUNK)]
        return [self.batch(SampleBatch.cat(chunk)) for chunk in chunks]
