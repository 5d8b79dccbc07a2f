"""What each pass trains on. Every choice for a picture is a function of the seed and of its place in the data order.

So a batch depends neither on how many processes or workers there are, nor on where a run was stopped and went on.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.training.cache import LatentCache, TextCache
from latentdiff.training.config import DiffusionSettings, RunSettings
from latentdiff.training.data import CaptionedPicture, assign_buckets, read_pixels
from latentdiff.training.data.view import View
from latentdiff.training.order import PictureOrder, generator_of, seed_of
from latentdiff.training.run import TrainingRun

SAMPLE, STRATA, POSTERIOR = 0, 1, 2  # kinds of draws, kept apart
HELD_OUT = 1 << 40  # where the draws for held-out pictures begin


@dataclass(frozen=True)
class Place:
    """A picture's place in training: picture `index` is number `slot` of the update of `step`."""

    step: int
    slot: int
    index: int


def places(run: TrainingRun, order: PictureOrder) -> Iterator[list[Place]]:
    """What the remaining passes of this process train on."""
    per_step = run.settings.gradient_accumulation_steps
    for number in run.remaining():
        step = number // per_step
        indices = order.update(step)
        yield [Place(step, slot, indices[slot]) for slot in run.slots(number)]


def loader(run: TrainingRun, order: PictureOrder, samples: "Dataset[Any]", collate: Any) -> Iterator[tuple[int, Any]]:
    """(pass number, batch) for every pass that the run still has to do."""
    batches = DataLoader(
        samples,
        batch_sampler=places(run, order),
        collate_fn=collate,
        num_workers=run.settings.num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory=run.device.type == "cuda",
    )
    try:  # passes() comes first: when it ends, no further batch is read.
        yield from zip(run.passes(), batches, strict=False)
    except RuntimeError:
        if not run.told_to_stop:  # a signal to the whole group ends the workers
            raise


def leave_signals_to_the_main_process(_worker: int) -> None:
    """Ctrl-C reaches the workers too; the main process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Views:
    """Which part of each picture is taken, and whether it is mirrored.

    Args:
        step: what the sides must be multiples of, in pixels.
        variants: how many different random crops a picture has; 0: any number.
    """

    def __init__(
        self, settings: RunSettings, pictures: Sequence[CaptionedPicture], step: int, variants: int = 0
    ) -> None:
        self.buckets = assign_buckets(pictures, settings.resolution, step, settings.buckets)
        self.random_crop, self.flip = settings.crop == "random", settings.random_flip
        self.variants = variants

    def pick(self, index: int, choices: Tensor) -> View:
        """The view of picture `index` for three uniform draws in [0, 1)."""
        x, y, flip = choices.tolist()
        if self.random_crop and self.variants:
            x, y = self._crop(int(x * self.variants))
        crop = (x, y) if self.random_crop else (0.5, 0.5)
        return View(*self.buckets[index], crop=crop, flip=self.flip and flip < 0.5)

    def all(self, index: int) -> list[View]:
        """Every view that `pick` can give, where there is a number of them."""
        crops = [self._crop(i) for i in range(self.variants)] if self.random_crop else [(0.5, 0.5)]
        flips = (False, True) if self.flip else (False,)
        return [View(*self.buckets[index], crop=crop, flip=flip) for crop in crops for flip in flips]

    def centred(self, index: int) -> View:
        return View(*self.buckets[index])

    def _crop(self, variant: int) -> tuple[float, float]:
        x, y = torch.rand(2, generator=generator_of(variant)).tolist()
        return x, y


class PixelSamples(Dataset[dict[str, Any]]):
    """Pictures for the autoencoder, (3, H, W) in [-1, 1]."""

    def __init__(self, settings: RunSettings, pictures: Sequence[CaptionedPicture], views: Views) -> None:
        self.settings, self.pictures, self.views = settings, pictures, views

    def __getitem__(self, place: Place) -> dict[str, Any]:
        view = self.views.pick(place.index, torch.rand(3, generator=sample_generator(self.settings, place)))
        picture = self.pictures[place.index]
        return {"pixels": read_view(picture, view), "place": place, "name": picture.name}


def sample_generator(settings: RunSettings, place: Place, stream: int = SAMPLE) -> torch.Generator:
    """The random generator of one picture's turn in one update."""
    return generator_of(settings.seed, stream, place.step, place.slot)


class Captions:
    """A picture's caption at each of its turns: one of several, perhaps reordered, perhaps left out."""

    def __init__(self, settings: DiffusionSettings) -> None:
        self.dropout, self.shuffle, self.keep = (
            settings.caption_dropout,
            settings.caption_shuffle,
            settings.caption_keep,
        )
        self.variants = settings.cached_variants if settings.cache_text else 1 << 30

    def pick(self, captions: Sequence[str], choices: Tensor) -> str:
        """The caption for three uniform draws in [0, 1)."""
        drop, which, variant = choices.tolist()
        if drop < self.dropout:
            return ""
        caption = captions[int(which * len(captions))]
        return self._shuffled(caption, int(variant * self.variants)) if self.shuffle else caption

    def all(self, captions: Sequence[str]) -> list[str]:
        """Every caption that `pick` can give from these, where the number is limited."""
        if not self.shuffle:
            return [*captions]
        return [self._shuffled(caption, i) for caption in captions for i in range(self.variants)]

    def _shuffled(self, caption: str, variant: int) -> str:
        parts = [part.strip() for part in caption.split(",")]
        kept, rest = parts[: self.keep], parts[self.keep :]
        order = torch.randperm(len(rest), generator=generator_of(variant, len(rest)))
        return ", ".join(kept + [rest[i] for i in order.tolist()])


@dataclass
class Sources:
    """Where a sample's latents and text come from: a cache, or the picture and the caption themselves."""

    latents: LatentCache | None
    text: TextCache | None
    tokenize: Any = None  # for a text encoder that is trained: caption -> dict of (L,) tensors


class DiffusionSamples(Dataset[dict[str, Any]]):
    """What the denoiser learns from: latents (or pixels), noise, a timestep and text, one picture at a time.

    Args:
        latent_channels, factor: of the autoencoder.
        num_timesteps: T.
        update_size: pictures in one update, over which timesteps are spread evenly.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        pictures: Sequence[CaptionedPicture],
        views: Views,
        sources: Sources,
        *,
        latent_channels: int,
        factor: int,
        num_timesteps: int,
        update_size: int,
    ) -> None:
        self.settings, self.pictures, self.views, self.sources = settings, pictures, views, sources
        self.latent_channels, self.factor = latent_channels, factor
        self.num_timesteps, self.update_size = num_timesteps, update_size
        self.captions = Captions(settings)

    def __getitem__(self, place: Place) -> dict[str, Any]:
        generator = sample_generator(self.settings, place)
        choices = torch.rand(7, generator=generator)
        picture = self.pictures[place.index]
        caption = self.captions.pick(picture.captions, choices[:3])
        view = self.views.pick(place.index, choices[3:6])
        return self.sample(picture, view, caption, self._timestep_draw(place, float(choices[6])), generator)

    def sample(
        self, picture: CaptionedPicture, view: View, caption: str, timestep_draw: float, generator: torch.Generator
    ) -> dict[str, Any]:
        """One picture's share of a batch, with random draws from `generator`; `timestep_draw`: from [0, 1)."""
        timestep = min(int(timestep_draw * self.num_timesteps), self.num_timesteps - 1)
        shape = (self.latent_channels, view.height // self.factor, view.width // self.factor)
        posterior_noise = torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        if self.settings.noise_offset:  # so that a whole picture can become lighter or darker
            noise = noise + self.settings.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        sample: dict[str, Any] = {"posterior_noise": posterior_noise, "noise": noise}
        sample |= {"timesteps": timestep, "timestep_draws": timestep_draw}
        if self.sources.latents is not None:
            sample["moments"] = self.sources.latents[picture, view]  # (2, C, h, w) float16
        else:
            sample["pixels"] = read_view(picture, view)
        if self.sources.tokenize is not None:
            sample |= self.sources.tokenize(caption)
        elif self.sources.text is not None:
            sample["encoder_hidden_states"] = self.sources.text[caption]  # (L, D) float16
        else:
            sample["caption"] = caption
        return {**sample, "loss_weight": picture.loss_weight, "name": picture.name}

    def _timestep_draw(self, place: Place, within: float) -> float:
        """Uniform in [0, 1), but each of an update's B equal bands has one picture, which lowers the loss's variance.

        Variational Diffusion Models (Kingma et al. 2021), App. I.1.
        """
        band = int(strata(self.settings.seed, place.step, self.update_size)[place.slot])
        return (band + within) / self.update_size


@lru_cache(maxsize=8)
def strata(seed: int, step: int, size: int) -> Tensor:
    """Which band of timesteps each picture of an update has. (size,)"""
    return torch.randperm(size, generator=generator_of(seed, STRATA, step))


def read_view(picture: CaptionedPicture, view: View) -> Tensor:
    """(3, H, W) in [-1, 1]"""
    return read_pixels(picture, view.width, view.height, view.crop, view.flip)


def held_out_samples(samples: DiffusionSamples, bands: int, most: int = 32) -> list[dict[str, Any]]:
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


def chunks_alike(samples: Sequence[dict[str, Any]], most: int = 16) -> Iterator[list[dict[str, Any]]]:
    """Samples cut into batches of one size of latents."""
    shapes = dict.fromkeys(sample["noise"].shape for sample in samples)
    for shape in shapes:
        alike = [sample for sample in samples if sample["noise"].shape == shape]
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def stack(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one batch: tensors and numbers stacked along B, the rest in lists."""
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], int | float):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch
