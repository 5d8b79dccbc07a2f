"""What data loaders read: one picture's turn at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.training.batch.batch_types import DiffusionSample, PixelBatch, ReadCaptions
from latentdiff.training.batch.choices import (
    POSTERIOR,
    CaptionChoice,
    Place,
    ViewChoice,
    sample_generator,
    sample_seed,
    time_draw,
)
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.data.pictures import View
from latentdiff.training.loop.order import seed_of
from latentdiff.training.settings import DiffusionSettings, RunSettings

HELD_OUT = 1 << 40  # where the seeds of held-out pictures begin


def read_view(picture: CaptionedPicture, view: View) -> Tensor:
    """(3, H, W) in [-1, 1]"""
    return read_pixels(picture, view.width, view.height, view.crop, view.flip)


class PixelSamples(Dataset[PixelBatch]):
    """Pictures for an autoencoder, each as a batch of one."""

    def __init__(self, settings: RunSettings, pictures: Sequence[CaptionedPicture], views: ViewChoice) -> None:
        self.settings, self.pictures, self.views = settings, pictures, views

    def __getitem__(self, place: Place) -> PixelBatch:
        view = self.views.pick(place.index, torch.rand(3, generator=sample_generator(self.settings, place)))
        picture = self.pictures[place.index]
        seed = sample_seed(self.settings, place, POSTERIOR)
        return PixelBatch(read_view(picture, view)[None], (seed,), place.step, (picture.name,))


class DiffusionSamples(Dataset[DiffusionSample]):
    """What denoisers and classifiers learn from: latents or pixels, noise, a draw of the timestep, and a condition.

    Args:
        read_picture, read_caption: by a cache, or as they are; see `batch.reader`.
        latent_channels, factor: of the autoencoder.
        update_size: pictures in one update, over which timesteps are spread evenly.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        pictures: Sequence[CaptionedPicture],
        views: ViewChoice,
        read_picture: Callable[[CaptionedPicture, View], Tensor],
        read_caption: Callable[[str], ReadCaptions],
        *,
        latent_channels: int,
        factor: int,
        update_size: int,
    ) -> None:
        self.settings, self.pictures, self.views = settings, pictures, views
        self.read_picture, self.read_caption = read_picture, read_caption
        self.latent_channels, self.factor, self.update_size = latent_channels, factor, update_size
        self.captions = CaptionChoice(settings)

    def __getitem__(self, place: Place) -> DiffusionSample:
        generator = sample_generator(self.settings, place)
        uniform = torch.rand(7, generator=generator)
        picture = self.pictures[place.index]
        caption = self.captions.pick(picture.captions, uniform[:3])
        view = self.views.pick(place.index, uniform[3:6])
        draw = time_draw(self.settings, place, self.update_size, float(uniform[6]))
        return self.sample(picture, view, caption, draw, generator)

    def sample(
        self, picture: CaptionedPicture, view: View, caption: str, draw: float, generator: torch.Generator
    ) -> DiffusionSample:
        """A picture's turn with these choices; the noise comes from `generator`."""
        shape = (self.latent_channels, view.height // self.factor, view.width // self.factor)
        posterior_noise = torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        if self.settings.noise_offset:  # so that a whole picture can become lighter or darker
            noise = noise + self.settings.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        return DiffusionSample(
            self.read_picture(picture, view),
            self.read_caption(caption),
            posterior_noise,
            noise,
            draw,
            picture.loss_weight,
            picture.name,
        )


def held_out_samples(samples: DiffusionSamples, bands: int, most: int = 32) -> list[DiffusionSample]:
    """Fixed samples of held-out pictures, their timesteps spread evenly over each of `bands` bands.

    samples: of the held-out pictures.
    """
    count = min(most, len(samples.pictures))
    chosen = []
    for i in range(count):
        for band in range(bands):
            generator = torch.Generator().manual_seed(seed_of(HELD_OUT, i, band))
            draw = (band + (i + 0.5) / count) / bands
            picture = samples.pictures[i]
            chosen.append(samples.sample(picture, samples.views.centred(i), picture.captions[0], draw, generator))
    return chosen


def chunks_alike(samples: Sequence[DiffusionSample], most: int = 16) -> Iterator[list[DiffusionSample]]:
    """Samples cut into batches of one size of latents."""
    shapes = dict.fromkeys(sample.noise.shape for sample in samples)
    for shape in shapes:
        alike = [sample for sample in samples if sample.noise.shape == shape]
        for start in range(0, len(alike), most):
            yield alike[start : start + most]
