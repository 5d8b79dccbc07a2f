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
from torch import Tensor

from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.metrics import psnr
from latentdiff.models import AutoencoderKL, FSQModel, GumbelVQModel, VQModel
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.pipelines.processes import processes
from latentdiff.training.alarms import Alarms
from latentdiff.training.autoencoder_objective import AutoencoderObjective, Judge
from latentdiff.training.config import AutoencoderSettings
from latentdiff.training.data import CaptionedPicture, NoPicturesError, prepare_pictures, read_pixels
from latentdiff.training.describe import describe
from latentdiff.training.draws import POSTERIOR, PixelSamples, Views, loader, sample_generator, stack
from latentdiff.training.order import PictureOrder
from latentdiff.training.run import TrainingRun

logger = logging.getLogger(__name__)


def build_autoencoder(settings: AutoencoderSettings) -> Any:
    """A new autoencoder of the kind and size that the settings describe."""
    attends = settings.attention_levels or (False,) * len(settings.block_out_channels)
    shape: dict[str, Any] = {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        "block_out_channels": settings.block_out_channels,
        "layers_per_block": settings.layers_per_block,
        "latent_channels": settings.latent_channels,
        "norm_num_groups": settings.norm_num_groups,
        "sample_size": settings.resolution,
    }
    match settings.kind:
        case "vq":
            return VQModel(**shape, num_vq_embeddings=settings.num_vq_embeddings)
        case "gumbel":
            return GumbelVQModel(**shape, num_vq_embeddings=settings.num_vq_embeddings)
        case "fsq":
            return FSQModel(**shape, levels=settings.fsq_levels)
    return AutoencoderKL(**shape)


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
    judge = discriminator = None
    if settings.discriminator_weight > 0:
        discriminator = PatchDiscriminator(
            channels=settings.discriminator_channels,
            layers=settings.discriminator_layers,
            norm=settings.discriminator_norm,
        )
        judge = Judge(discriminator, settings)
    objective = AutoencoderObjective(autoencoder, settings, discriminator)
    run = TrainingRun(settings, objective, judge, settings.discriminator_learning_rate)
    alarms = Alarms()

    def statistics() -> dict[str, float]:
        figures = objective.report() | ({} if judge is None else judge.report())
        alarms.hear(figures)
        return figures

    run.statistics = statistics
    pixels = validation_pixels(settings, held_out, pictures)

    views = Views(settings, pictures, settings.factor)
    order = PictureOrder([p.weight for p in pictures], run.update_size, settings.seed, views.buckets)
    for _, batch in loader(run, order, PixelSamples(settings, pictures, views), stack):
        generators = [sample_generator(settings, place, POSTERIOR) for place in batch["place"]]
        run.learn(batch["pixels"].to(run.device), generators, step=run.step, names=batch["name"])
        if run.due(settings.sample_every):
            with run.averaged():
                report(run, autoencoder, pixels)
            alarms.hear_validation(run.figures, judge is not None and run.step > settings.discriminator_start)
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
