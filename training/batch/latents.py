"""Latents of pictures: from a cache, or from the frozen autoencoder that would fill it.

The cache keeps mean and deviation of the encoder's posterior, so that training can sample it each time.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from latentdiff.codec import Codec, Posterior, TokenCodec
from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.training.batch.cache import DIGEST, TensorStore, digest, evaluating, finite, plain_config
from latentdiff.training.batch.filling import Batches, fill, is_filled
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.data.captioned_picture import View
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings

logger = logging.getLogger(__name__)

PictureView = tuple[CaptionedPicture, View]

PART = 1 << 20  # pictures whose latents are looked for and encoded at a time
PIXELS = 1  # to be raised when `read_pixels` gives other pixels for the same view
OF_THE_DECODER = (
    *("up_block_types", "out_channels", "use_post_quant_conv", "num_vq_embeddings", "lookup_from_codebook"),
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size"),
)


class LatentCache:
    """Latents by picture and view, in a folder named after what encodes.

    Args:
        folder: may be shared by any number of encoders, runs and processes.
        autoencoder: ours or diffusers' ``AutoencoderKL`` or ``VQModel``. It is not kept.
        labels: see `TensorStore`.
        codec: what makes latents with it: `TokenCodec`, codes.
    """

    def __init__(
        self,
        folder: Path,
        autoencoder: Any,
        labels: Mapping[str, str] | None = None,
        codec: type[Codec] = Codec,
    ) -> None:
        self.codec = codec
        self.store = TensorStore(Path(folder) / codec_digest(codec(autoencoder)), labels)

    def __getitem__(self, key: PictureView) -> Tensor:
        """(2, C, h, w) float16: mean and standard deviation, unscaled; the latter is 0 for a codebook's latents.

        Of an `IdentityAutoencoder` (1, C, h, w) float32, the pixels: rounded, they would no longer be one of the 256
        values that a likelihood of pixels is about, and they have no deviation. Of a `TokenCodec` (1, 1, h, w), codes.

        Raises:
            KeyError: they were not encoded.
        """
        picture, view = key
        try:
            return self.store[key_of(picture, view)]
        except KeyError:
            raise KeyError(f"{picture.name} was not encoded as {view}") from None

    def fill(
        self,
        wanted: Iterable[PictureView],
        autoencoder: Any,
        accelerator: Accelerator,
        batch_size: int = 8,
        num_workers: int = 0,
        what: str | None = None,
    ) -> None:
        """Encode what is missing, each process its share; goes on where an interrupted one stopped.

        Args:
            wanted: the same in each process; very many are gone through part by part. Pictures need their digest.
            autoencoder: the one that the cache was made for, on the device that encodes.
            what: see `is_filled`.

        Raises:
            ValueError: a picture cannot be read, or its latents are not finite; it is named.
            OSError: the disk is full.
        """
        what = what and digest(PIXELS, what)
        if is_filled(self.store, what, accelerator, "pictures"):
            return
        with evaluating(autoencoder):
            left = iter(wanted)
            while part := list(islice(left, PART)):
                self._fill(part, self.codec(autoencoder), accelerator, batch_size, num_workers)
        if what is not None and accelerator.is_main_process:
            self.store.note(what)

    def _fill(
        self, wanted: Sequence[PictureView], codec: Codec, accelerator: Accelerator, batch_size: int, num_workers: int
    ) -> None:
        by_key = {key_of(picture, view): (picture, view) for picture, view in wanted}

        def encoded(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
            for keys, pixels in load(by_key, batches, num_workers, read_view):
                names = [by_key[key][0].name for key in keys]
                moments = finite(
                    encode(codec, pixels),  # (B, 2, C, h, w), or (B, 1, C, h, w)
                    names,
                    codec.kept_as,
                    "is the autoencoder sound, and in float32? Without cache_latents it need not be below",
                )
                yield dict(zip(keys, moments, strict=True))

        def size(key: str) -> tuple[int, int]:
            return by_key[key][1].width, by_key[key][1].height

        count = len({picture.digest for picture, _ in by_key.values()})
        mirrored = ", as they are and mirrored," if any(view.flip for _, view in by_key.values()) else ""
        things = "pictures" if count == len(by_key) else f"views of {count} pictures{mirrored}"
        fill(self.store, list(by_key), encoded, accelerator, batch_size=batch_size, kind=size, things=things)


def load(
    by_key: Mapping[str, PictureView], batches: Batches, num_workers: int, read: Callable[[PictureView], Tensor]
) -> Iterator[tuple[list[str], Tensor]]:
    """Keys and what is read of their views (B, ...) of each batch."""
    if batches:
        own = torch.Generator()  # so that the run's random state does not depend on what was cached
        yield from DataLoader(Views(by_key, read), batch_sampler=batches, num_workers=num_workers, generator=own)


class Views(Dataset[tuple[str, Tensor]]):
    """Key of a view and what is read of it."""

    def __init__(self, by_key: Mapping[str, PictureView], read: Callable[[PictureView], Tensor]) -> None:
        self.by_key, self.read = by_key, read

    def __getitem__(self, key: str) -> tuple[str, Tensor]:
        return key, self.read(self.by_key[key])


def read_view(pictured: PictureView) -> Tensor:
    """(3, H, W) in [-1, 1]"""
    picture, view = pictured
    return read_pixels(picture, view.width, view.height, view.crop, view.flip)


def encode(codec: Codec, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] to mean and standard deviation, (B, 2, C, h, w); of pixels and codes only themselves."""
    if codec.is_identity:
        return pixels[:, None]
    posterior = codec.posterior(pixels)
    if isinstance(codec, TokenCodec):
        return posterior.mean[:, None]
    std = torch.zeros_like(posterior.mean) if posterior.std is None else posterior.std
    return torch.stack([posterior.mean, std], dim=1)


def key_of(picture: CaptionedPicture, view: View) -> str:
    if not picture.digest:
        raise ValueError(f"{picture.name}: has no digest; take pictures from prepare_pictures, or set its SHA-256")
    return digest(PIXELS, picture.digest, view.width, view.height, view.crop, view.flip)


def codec_digest(codec: Codec) -> str:
    """A digest of what latents depend on: the encoder's weights and shape, but neither the decoder's nor the scale.

    Where they are codes, those of what makes codes count too.
    """
    autoencoder = codec.autoencoder
    parts: tuple[str, ...] = ("encoder.", "quant_conv.")
    kind = "vq" if hasattr(autoencoder, "quantize") else "kl"
    if isinstance(codec, TokenCodec):
        kind, parts = f"codes of {codec.codes}", (*parts, "quantize.")
    if codec.is_identity:
        kind = "pixels"
    state = autoencoder.state_dict()
    weights = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    return digest(kind, weights_digest(weights or state)[:DIGEST], plain_config(autoencoder.config, *OF_THE_DECODER))


def latents_digest(codec: Codec) -> str:
    """A digest of what scaled latents depend on."""
    return digest(codec_digest(codec), codec.scale, codec.shift)


@dataclass(frozen=True)
class LatentSource:
    """Latents of pictures.

    Args:
        cache: None: each batch goes through the autoencoder.
    """

    codec: Codec
    device: torch.device
    cache: LatentCache | None = None

    @property
    def read(self) -> Callable[[PictureView], Tensor]:
        """For the workers of a data loader: moments or pixels of a picture's view."""
        return read_view if self.cache is None else self.cache.__getitem__

    @property
    def idle(self) -> tuple[nn.Module, ...]:
        """Networks that training does not need, as the cache takes their place."""
        return () if self.cache is None else (self.codec.autoencoder,)

    @torch.no_grad()
    def latents(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """What was read to scaled latents (B, C, h, w) float32, drawn from the posterior by `noise` of that shape."""
        if self.cache is None:
            return self.codec.encode_with(pictures, noise)
        mean, *std = pictures.to(self.device, non_blocking=True).float().unbind(1)  # (B, C, h, w) each
        return self.codec.scaled(Posterior(mean, *std).sample(noise.to(self.device, non_blocking=True)))


@dataclass(frozen=True)
class NoLatents(LatentSource):
    """What an objective takes that looks at no pictures: none is read, and latents are zeros."""

    @property
    def read(self) -> Callable[[PictureView], Tensor]:
        return read_nothing

    @property
    def idle(self) -> tuple[nn.Module, ...]:
        return (self.codec.autoencoder,)

    def latents(self, pictures: Tensor, noise: Tensor) -> Tensor:
        return torch.zeros_like(noise, device=self.device)


def read_nothing(_: PictureView) -> Tensor:
    return torch.zeros(0)


def latent_source(
    run: TrainingRun,
    settings: DiffusionSettings,
    codec: Codec,
    wanted: Callable[[], Iterable[PictureView]],
    what: str | None = None,
) -> LatentSource:
    """The source that the settings ask for; a cache is filled with all that `wanted` gives; `what`: see `is_filled`.

    The autoencoder is back on the CPU afterwards where it is not needed, so that a GPU's memory is the denoiser's.
    """
    codec.autoencoder.to(run.device)
    if not settings.cache_latents:
        return LatentSource(codec, run.device)
    labels = cache_labels(settings, "autoencoder", "model")
    cache = LatentCache(cache_folder(run, settings) / "latents", codec.autoencoder, labels, type(codec))
    size, workers = min(8, settings.batch_size), settings.num_workers
    cache.fill(wanted(), codec.autoencoder, run.accelerator, size, workers, what)
    codec.autoencoder.to("cpu")
    return LatentSource(codec, run.device, cache)


def cache_folder(run: TrainingRun, settings: DiffusionSettings) -> Path:
    """The folder of a run's caches: the user's own for all runs, unless the settings name another one.

    A run that began with one of its own keeps it; so does a run on several machines, which may share nothing else, and
    one whose user has no folder that can be written.
    """
    own = run.folder / "cache"
    if settings.cache_dir:
        return Path(settings.cache_dir).expanduser()
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < run.accelerator.num_processes
    if own.is_dir() or several:
        return own
    shared = shared_folder()
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("what is encoded is kept in %s, for %s cannot be made (%s)", own, shared, error.strerror)
        return own
    return shared if os.access(shared, os.W_OK) else own


def cache_labels(settings: DiffusionSettings, *encoders: str) -> dict[str, str]:
    """What files of the cache say of what they were made: the data, and the first of these settings that there is."""
    model = next((getattr(settings, name) for name in encoders if getattr(settings, name, None)), "")
    named = {"data": settings.data, "model": str(model)}
    return {key: os.path.abspath(name) if os.path.exists(name) else name for key, name in named.items()}
