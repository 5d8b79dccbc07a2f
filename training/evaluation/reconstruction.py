"""Reconstructions of held-out pictures by an autoencoder: figures, and a sheet that shows them."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from latentdiff.codec import Posterior
from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.picture_files import to_pictures
from latentdiff.interchange.png import image_grid
from latentdiff.metrics import frechet_distance, psnr, ssim
from latentdiff.metrics.extractors import AUTO, Extractor, load_extractor
from latentdiff.metrics.pixels import WINDOW
from latentdiff.models.bottlenecks import usage
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.load import unseen
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.perceptual import PerceptualLoss
from latentdiff.training.settings import AutoencoderSettings
from latentdiff.training.trainers.latent_scale import LatentMoments, chunk_size, read_chunks, spread

logger = logging.getLogger(__name__)

COLUMNS, SHOWN = 8, 16  # of the sheet: pictures in a row, and altogether
AMPLIFIED = 4
FIGURES = "evaluation.json"
Loaded = TypeVar("Loaded")


class Reconstructions:
    """Held-out pictures through an autoencoder, measured and drawn as often as its trainer asks.

    Figures: ``psnr``; ``ssim``, if the pictures are large enough; ``lpips``, or with another network
    ``val_perceptual``; ``rfid``, or with another extractor than FID's ``frechet``; of codes ``val_codes_used`` (share)
    and ``val_perplexity``, of others ``val_latent_mean``, ``val_latent_std`` and ``val_posterior_std``. Those with
    ``val_`` are reported of training batches too, without it. If reconstructions are not finite there is only
    ``not_finite``, how many.

    Args:
        settings: ``validation_pictures`` at most are taken, evenly spread, and kept in memory.
        held_out: those of the split "validation"; where all of them are training pictures too, or there are none, the
            figures are of training pictures, with a warning.
        pictures: those that are trained on.
        perceptual: the trainer's own, so that it is not loaded twice; by default ``settings.perceptual_network``.

    Raises:
        FileNotFoundError, ValueError: what ``perceptual_network`` or ``validation_extractor`` names cannot be loaded.
    """

    def __init__(
        self,
        settings: AutoencoderSettings,
        held_out: Sequence[CaptionedPicture],
        pictures: Sequence[CaptionedPicture],
        perceptual: PerceptualLoss | None = None,
    ) -> None:
        held_out = unseen(held_out, pictures)  # folders that know no splits give the same pictures again
        if not held_out:
            logger.warning("no held-out pictures (split 'validation'): figures are of training pictures")
        self.settings = settings
        self.held_out = bool(held_out)
        self.pictures = spread(held_out or pictures, settings.validation_pictures)
        lpips, frechet = "perceptual distance", "Frechet distance"
        self.perceptual = perceptual or load_if_there(PerceptualLoss, settings.perceptual_network, None, lpips)
        self.extractor: Extractor | None = None
        if len(self.pictures) > 1:
            self.extractor = load_if_there(load_extractor, settings.validation_extractor, AUTO, frechet)
        else:
            logger.info("no Frechet distance of reconstructions: it needs two pictures at least")
        self._pixels: Tensor | None = None
        self._features: Tensor | None = None

    @property
    def pixels(self) -> Tensor:
        """(N, 3, R, R) in [-1, 1]."""
        if self._pixels is None:
            self._pixels = torch.cat(list(read_chunks(self.pictures, self.settings)))
        return self._pixels

    @torch.no_grad()
    def report(self, run: TrainingRun, model: Any) -> None:
        """Measure reconstructions by `model` as it is, and draw a sheet, in ``training/samples``; see `sheet`."""
        if not run.takes_part:
            return
        counted = Counted()
        drawn: list[Tensor] = []
        for originals in self.pixels.split(chunk_size(self.settings)):
            originals = originals.to(run.device)
            output = Reconstructed.by(model, originals)
            if not run.accelerator.is_main_process:  # under FSDP all reconstruct, and one measures
                continue
            counted.add(output)
            if counted.not_finite == 0:
                self._compare(originals, output.pixels, counted)
            drawn.append(output.pixels[: max(0, SHOWN - counted.pictures + len(originals))].cpu())
        if not run.accelerator.is_main_process:
            return
        if counted.not_finite == 0:
            run.measured(self._figures(counted))
        else:
            logger.error(
                "step %d: %d of %d reconstructions hold values that are not finite; they were not measured. The "
                "weights are broken: go back to an earlier checkpoint, with a lower learning_rate",
                *(run.step, counted.not_finite, counted.pictures),
            )
            run.measured({"not_finite": float(counted.not_finite)})
        run.show("reconstructions", sheet(self.pixels[:SHOWN], torch.cat(drawn)))

    def write(self, run: TrainingRun, folder: Path) -> None:
        """``evaluation.json`` in `folder`: the last figures, and of what they are. Only the main process writes."""
        if not run.accelerator.is_main_process:
            return
        figures = {name: value if math.isfinite(value) else None for name, value in run.figures.items()}
        about = {
            "step": run.step,
            "pictures": len(self.pictures),
            "held_out": self.held_out,
            "resolution": self.settings.resolution,
            "perceptual_network": self.perceptual.name if self.perceptual else None,
            "extractor": self.extractor.describe() if self.extractor else None,
        }
        write_text_whole(folder / FIGURES, json.dumps({**figures, **about}, indent=2) + "\n", sync=True)

    def _compare(self, want: Tensor, have: Tensor, counted: "Counted") -> None:
        """Add to `counted` what pictures and their reconstructions (B, 3, H, W) say together."""
        counted.sum("psnr", psnr(have, want), len(have))
        if min(have.shape[-2:]) >= WINDOW:
            counted.sum("ssim", ssim(have, want), len(have))
        if self.perceptual is not None:
            name = "lpips" if self.perceptual.is_lpips else "val_perceptual"
            counted.sum(name, float(self.perceptual(have, want)), len(have))
        if self.extractor is not None:
            extractor = self.extractor.to(have.device)
            counted.features.append(extractor(to_pictures(have)))
            if self._features is None:
                counted.real_features.append(extractor(to_pictures(want)))

    def _figures(self, counted: "Counted") -> dict[str, float]:
        figures = {name: total / counted.pictures for name, total in counted.sums.items()}
        if self.extractor is not None:
            if self._features is None:
                self._features = torch.cat(counted.real_features)
                count, dimensions = self._features.shape
                if count <= dimensions:
                    logger.info(
                        "%d pictures are few for the %d features of the %s: their Frechet distance can be compared "
                        "only at equal counts",
                        *(count, dimensions, self.extractor.name),
                    )
            key = "rfid" if self.extractor.is_fid else "frechet"
            figures[key] = frechet_distance(torch.cat(counted.features), self._features)
        if counted.indices:
            used = usage(torch.cat(counted.indices), counted.codes)
            figures |= {f"val_{name}": float(value) for name, value in used.items()}
        else:
            figures |= {"val_latent_mean": counted.latents.mean, "val_latent_std": counted.latents.std}
        return figures


class Reconstructed(NamedTuple):
    """What an autoencoder makes of pictures (B, 3, H, W).

    Attributes:
        pixels: (B, 3, H, W) float32.
        indices: (B, h, w), of the codes, or None.
        codes: how many there are.
        latents: (B, C, h, w), without noise, or None.
        statistics: what the bottleneck says of them.
    """

    pixels: Tensor
    indices: Tensor | None = None
    codes: int = 0
    latents: Tensor | None = None
    statistics: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def by(cls, model: Any, originals: Tensor) -> "Reconstructed":
        """One pass through `model`, by way of its codes if it has any."""
        if hasattr(model, "encode_to_indices"):
            indices = model.encode_to_indices(originals)
            return cls(model.decode_from_indices(indices).float(), indices, model.codes)
        output = model(originals, sample_posterior=False)
        found = output.bottleneck
        return cls(output.sample.float(), latents=found.latents, statistics=found.statistics)


class Counted:
    """Sums over chunks of pictures; nothing in it grows with their size."""

    def __init__(self) -> None:
        self.pictures = self.not_finite = self.codes = 0
        self.sums: dict[str, float] = {}
        self.indices: list[Tensor] = []
        self.features: list[Tensor] = []
        self.real_features: list[Tensor] = []
        self.latents = LatentMoments()

    def sum(self, name: str, mean: float, count: int) -> None:
        """Add the mean of `count` pictures."""
        self.sums[name] = self.sums.get(name, 0.0) + mean * count

    def add(self, output: Reconstructed) -> None:
        self.pictures += len(output.pixels)
        self.not_finite += int((~output.pixels.isfinite()).flatten(1).any(1).sum())
        self.codes = output.codes
        if output.indices is not None:
            self.indices.append(output.indices.cpu())
        if output.latents is not None:
            self.latents.add(Posterior(output.latents))
        if "posterior_std" in output.statistics:
            self.sum("val_posterior_std", float(output.statistics["posterior_std"]), len(output.pixels))


def sheet(originals: Tensor, reconstructed: Tensor) -> Image.Image:
    """Originals, below them their reconstructions, below those the absolute differences, four times as large as they
    are (black: none).

    originals, reconstructed: (N, 3, H, W) in [-1, 1]. Rows of eight; an incomplete one ends in white.
    """
    differences = (AMPLIFIED * (reconstructed - originals).abs()).clamp(max=2) - 1
    columns = min(COLUMNS, len(originals))
    white = Image.new("RGB", (originals.shape[-1], originals.shape[-2]), "white")
    images: list[Image.Image] = []
    for start in range(0, len(originals), columns):
        for kind in (originals, reconstructed, differences):
            row = to_pictures(kind[start : start + columns])
            images += row + [white] * (columns - len(row))
    return image_grid(images, columns)


def load_if_there(load: Callable[[Any], Loaded], name: str | None, default: str | None, what: str) -> Loaded | None:
    """What the settings name; the default one may be missing, and then there is no figure of this kind."""
    try:
        return load(name)
    except FileNotFoundError as error:
        if name != default:
            raise
        logger.info("no %s of reconstructions: %s", what, error)
        return None
