"""Training an autoencoder: pictures in, the same pictures out, through few latents."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.metrics import psnr
from latentdiff.models import AutoencoderKL, VQModel
from latentdiff.pipelines.processes import processes
from latentdiff.training.config import AutoencoderSettings
from latentdiff.training.data import CaptionedPicture, NoPicturesError, prepare_pictures, read_pixels
from latentdiff.training.describe import describe
from latentdiff.training.draws import POSTERIOR, PixelSamples, Views, loader, sample_generator, stack
from latentdiff.training.order import PictureOrder
from latentdiff.training.perceptual import PerceptualLoss
from latentdiff.training.run import TrainingRun

logger = logging.getLogger(__name__)


def build_autoencoder(settings: AutoencoderSettings) -> AutoencoderKL | VQModel:
    """A new autoencoder of the kind and size that the settings describe."""
    levels = len(settings.block_out_channels)
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": settings.block_out_channels,
        "layers_per_block": settings.layers_per_block,
        "latent_channels": settings.latent_channels,
        "norm_num_groups": settings.norm_num_groups,
        "sample_size": settings.resolution,
    }
    if settings.kind == "vq":
        return VQModel(**shape, num_vq_embeddings=settings.num_vq_embeddings)
    return AutoencoderKL(**shape)


class AutoencoderObjective(nn.Module):
    """The loss of an autoencoder: reconstruction (L1, L2, perceptual) and what the bottleneck asks for.

    The bottleneck's losses carry their own names; `kl_weight` applies to ``kl``, the others are added as they are.
    """

    def __init__(self, autoencoder: AutoencoderKL | VQModel, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.settings = settings
        self.perceptual: PerceptualLoss | None = None
        if settings.perceptual_weight > 0:
            self.perceptual = PerceptualLoss(settings.perceptual_weights)

    def forward(self, pixels: Tensor, generator: list[torch.Generator] | None = None) -> Tensor:
        """pixels: (B, 3, H, W) in [-1, 1]; generator: one for each picture. Returns the loss, a float32 scalar."""
        output = self.autoencoder(pixels, sample_posterior=True, generator=generator)
        difference = output.sample.float() - pixels
        loss = self.settings.l1_weight * difference.abs().mean() + self.settings.l2_weight * difference.square().mean()
        if self.perceptual is not None:
            loss = loss + self.settings.perceptual_weight * self.perceptual(output.sample, pixels)
        for name, value in output.bottleneck.losses.items():
            loss = loss + (self.settings.kl_weight if name == "kl" else 1.0) * value.float()
        return loss


def train_autoencoder(settings: AutoencoderSettings) -> Path:
    """Train an autoencoder, or go on with a run that `settings.output` holds; returns the model's folder.

    Raises:
        ValueError, FileNotFoundError: settings or pictures that cannot be trained on; the message says what to do.
    """
    if settings.resolution % settings.factor:
        raise ValueError(f"resolution {settings.resolution} is not divisible by the factor {settings.factor}")
    with processes().main_process_first():
        pictures = prepare_pictures(settings, captions_needed=False)
        held_out = validation_pictures(settings)
    set_seed(settings.seed)  # the first weights
    autoencoder = build_autoencoder(settings)
    if settings.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    run = TrainingRun(settings, AutoencoderObjective(autoencoder, settings))
    pixels = validation_pixels(settings, held_out, pictures)

    views = Views(settings, pictures, settings.factor)
    order = PictureOrder([p.weight for p in pictures], run.update_size, settings.seed, views.buckets)
    for _, batch in loader(run, order, PixelSamples(settings, pictures, views), stack):
        generators = [sample_generator(settings, place, POSTERIOR) for place in batch["place"]]
        run.learn(batch["pixels"].to(run.device), generators, names=batch["name"])
        if run.due(settings.sample_every):
            with run.averaged():
                report(run, autoencoder, pixels)
    run.end_training()

    output = Path(settings.output)
    with run.averaged():
        autoencoder = run.whole(autoencoder)
        if run.accelerator.is_main_process:
            measure_scaling_factor(autoencoder, pictures, settings)
            autoencoder.save_pretrained(output)
            (output / "evaluation.json").write_text(json.dumps(run.figures, indent=2) + "\n", encoding="utf-8")
            describe(run, settings, f"{settings.kind.upper()} autoencoder", len(pictures))
    run.finish()
    return output


def validation_pictures(settings: AutoencoderSettings) -> list[CaptionedPicture]:
    """Those of the split "validation", if there is one."""
    try:
        return prepare_pictures(settings, "validation", captions_needed=False)
    except NoPicturesError:
        return []


def validation_pixels(
    settings: AutoencoderSettings,
    held_out: Sequence[CaptionedPicture],
    pictures: Sequence[CaptionedPicture],
    most: int = 64,
) -> Tensor:
    """Held-out pictures where the data has them, else the first training pictures. (N, 3, R, R)"""
    seen = {picture.digest for picture in pictures}  # folders that know no splits give the same pictures again
    held_out = [picture for picture in held_out if picture.digest not in seen]
    if not held_out:
        logger.warning("no held-out pictures (split 'validation'): figures are of training pictures")
    chosen = (held_out or pictures)[:most]
    return torch.stack([read_pixels(picture, settings.resolution, settings.resolution) for picture in chosen])


def report(run: TrainingRun, model: Any, pixels: Tensor) -> None:
    """Record the PSNR of reconstructions of `pixels` (N, 3, R, R) and draw them below the originals."""
    if not run.takes_part:
        return
    with torch.no_grad():
        reconstructed = torch.cat([model(chunk.to(run.device)).sample.cpu() for chunk in pixels.split(16)])
    run.measured({"psnr": psnr(reconstructed, pixels)})
    rows = zip(pixels[:32].split(8), reconstructed[:32].split(8), strict=True)
    images = [to_image(p) for row in rows for half in row for p in half]
    if not run.accelerator.is_main_process:
        return
    file = run.folder / "samples" / f"step-{run.step:08d}.png"
    save_picture(image_grid(images, min(8, len(pixels))), file)
    run.show("reconstructions", file)


def to_image(pixels: Tensor) -> Image.Image:
    """A picture from (3, H, W) in [-1, 1]."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


@torch.no_grad()
def measure_scaling_factor(
    model: Any, pictures: Sequence[CaptionedPicture], settings: AutoencoderSettings, most: int = 1024
) -> float:
    """Set `config.scaling_factor` so that scaled latents have unit standard deviation (Rombach et al. 2022, App. G).

    Measured over at most `most` of the training pictures, evenly spread.
    """
    stride = max(1, len(pictures) // most)
    device = next(model.parameters()).device
    chosen = list(pictures[::stride])
    latents = []
    for start in range(0, len(chosen), 16):
        chunk = [
            read_pixels(picture, settings.resolution, settings.resolution) for picture in chosen[start : start + 16]
        ]
        encoded = model.encode(torch.stack(chunk).to(device))
        latents.append(encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean)
    factor = 1 / float(torch.cat(latents).float().std())
    model.register_to_config(scaling_factor=factor)
    return factor
