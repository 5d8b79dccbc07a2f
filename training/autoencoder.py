"""Training an autoencoder: pictures in, the same pictures out, through few latents."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.models import AutoencoderKL, VQModel
from latentdiff.training.config import AutoencoderSettings
from latentdiff.training.data import BatchOrder, CaptionedPicture, PixelDataset, load_pictures, read_pixels
from latentdiff.training.perceptual import PerceptualLoss
from latentdiff.training.run import TrainingRun

logger = logging.getLogger(__name__)

POSTERIOR, ORDER = 0, 1  # streams of TrainingRun.generator


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

    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels: (B, 3, H, W) in [-1, 1]. Returns the loss, a float32 scalar."""
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
    set_seed(settings.seed)  # the first weights, and whatever draws without a generator of its own
    pictures = load_pictures(settings.data, settings.split, settings.image_column, settings.caption_column)
    autoencoder = build_autoencoder(settings)
    run = TrainingRun(settings, AutoencoderObjective(autoencoder, settings), autoencoder)
    held_out = validation_pixels(settings, pictures)

    for number, pixels in batches(run, settings, pictures):
        run.learn(pixels.to(run.device), generator=run.generator(POSTERIOR, number))
        if run.due(settings.sample_every):
            with run.averaged() as model, torch.no_grad():
                report(run, model, held_out)
    run.save()

    output = Path(settings.output)
    with run.averaged() as model:
        if run.accelerator.is_main_process:
            figures = report(run, model, held_out)
            measure_scaling_factor(model, pictures, settings)
            model.save_pretrained(output)
            (output / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    run.accelerator.wait_for_everyone()
    return output


def batches(
    run: TrainingRun, settings: AutoencoderSettings, pictures: Sequence[CaptionedPicture]
) -> Iterator[tuple[int, Tensor]]:
    """(pass number, pixels (B, 3, R, R)) for every pass that the run still has to do."""
    accelerator = run.accelerator
    order = BatchOrder(
        [picture.weight for picture in pictures],
        settings.batch_size,
        settings.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    first = run.step * settings.gradient_accumulation_steps
    last = settings.max_steps * settings.gradient_accumulation_steps

    def keys() -> Iterator[list[tuple[int, bool]]]:
        for number in range(first, last):
            flips = torch.rand(settings.batch_size, generator=run.generator(ORDER, number)) < 0.5
            yield [(i, settings.random_flip and bool(f)) for i, f in zip(order.batch(number), flips, strict=True)]

    loader = DataLoader(
        PixelDataset(pictures, settings.resolution), batch_sampler=keys(), num_workers=settings.num_workers
    )
    # passes() comes first: when it ends, no further batch is read.
    yield from zip(run.passes(), loader, strict=False)


def validation_pixels(settings: AutoencoderSettings, pictures: Sequence[CaptionedPicture], most: int = 64) -> Tensor:
    """Held-out pictures (split "validation") where the data has them, else the first training pictures. (N, 3, R, R)"""
    try:
        held_out = load_pictures(settings.data, "validation", settings.image_column, settings.caption_column)
    except (FileNotFoundError, ValueError):
        held_out = []
    seen = {picture.name for picture in pictures}  # folders that know no splits give the same pictures again
    held_out = [picture for picture in held_out if picture.name not in seen]
    if not held_out:
        logger.warning("no held-out pictures (split 'validation'): figures are of training pictures")
    pictures = held_out or pictures
    return torch.stack([read_pixels(picture, settings.resolution) for picture in pictures[:most]])


def report(run: TrainingRun, model: Any, pixels: Tensor) -> dict[str, float]:
    """Record the PSNR of reconstructions of `pixels` (N, 3, R, R) and draw them below the originals."""
    with torch.no_grad():
        reconstructed = torch.cat([model(chunk.to(run.device)).sample.cpu() for chunk in pixels.split(16)])
    figures = {"psnr": psnr(reconstructed, pixels)}
    run.record(**figures)
    rows = zip(pixels[:32].split(8), reconstructed[:32].split(8), strict=True)
    images = [to_image(p) for row in rows for half in row for p in half]
    save_picture(image_grid(images, min(8, len(pixels))), run.folder / "samples" / f"step-{run.step:08d}.png")
    return figures


def to_image(pixels: Tensor) -> Image.Image:
    """A picture from (3, H, W) in [-1, 1]."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def psnr(prediction: Tensor, target: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of (N, C, H, W) pictures in [-1, 1], clamped to it."""
    error = F.mse_loss(prediction.clamp(-1, 1), target, reduction="none").mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error.clamp(min=1e-10))).mean())


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
        chunk = [read_pixels(picture, settings.resolution) for picture in chosen[start : start + 16]]
        encoded = model.encode(torch.stack(chunk).to(device))
        latents.append(encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean)
    factor = 1 / float(torch.cat(latents).float().std())
    model.register_to_config(scaling_factor=factor)
    return factor
