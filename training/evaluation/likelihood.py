"""The variational bound of held-out pictures, in bits per dimension."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.codec import Codec
from latentdiff.diffusion import GaussianDiffusion, bits_per_dimension
from latentdiff.diffusion.losses import BitsPerDimension, discretized_gaussian_log_likelihood, gaussian_log_likelihood
from latentdiff.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.data.caption_checks import labels_of
from latentdiff.training.evaluation.held_out import check_report, held_out_pictures, write_report
from latentdiff.training.settings import LikelihoodSettings

logger = logging.getLogger(__name__)

REPORT = "likelihood.json"
GUESSED = 0.5 * math.log2(2 * math.pi * math.e)
"""Bits per dimension of latents for who knows but their mean and variance, which are 0 and 1."""


@dataclass(frozen=True)
class Bound:
    """A model, and the process whose bound is measured on it. Called with (x_t, timesteps) and `class_labels`."""

    pipeline: ClassConditionalPipeline | UnconditionalPipeline
    process: GaussianDiffusion

    @property
    def in_pixels(self) -> bool:
        return self.pipeline.vqvae is None

    def prediction(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """(B, C, h, w), or twice the channels where the process takes the variances that the UNet has learned."""
        unet = self.pipeline.unet
        given = {} if class_labels is None else {"class_labels": class_labels}
        found = unet(x.to(unet.dtype), timesteps, return_dict=False, **given)[0].float()
        return found if self.process.learns_variance else found[:, : x.shape[1]]

    def of(self, pixels: Tensor, class_labels: Tensor | None, seeds: Sequence[int]) -> BitsPerDimension:
        """Of pictures (B, 3, H, W) in [-1, 1], each with the noise of its seed; `class_labels` (B,)."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x_start = pixels if self.in_pixels else Codec(self.pipeline.vae).encode(pixels, generators).float()
        return bits_per_dimension(
            self.process,
            lambda x, timesteps: self.prediction(x, timesteps, class_labels),
            x_start,
            generators,
            discretized_gaussian_log_likelihood if self.in_pixels else gaussian_log_likelihood,
            clip_denoised=self.in_pixels,
        )


def process_of(pipeline: Any, steps: str | None, variance: str | None) -> GaussianDiffusion:
    """The process that the pipeline's scheduler samples from, in fewer steps and with another variance if asked for.

    Raises:
        ValueError: there are no such steps, or the UNet has not learned variances.
    """
    config: Mapping[str, Any] = pipeline.scheduler.config
    if variance is not None:
        config = {**config, "variance_type": variance}
    process = GaussianDiffusion.from_scheduler_config(config)
    unet = pipeline.unet.config
    if process.learns_variance and unet.out_channels != 2 * unet.in_channels:
        raise ValueError(
            f"this UNet has learned no variances: it gives {unet.out_channels} channels and would have to give "
            f"{2 * unet.in_channels}; choose --variance fixed_small or fixed_large, or train with loss=hybrid"
        )
    return process if steps is None else process.respaced(steps)


def evaluate_likelihood(
    pipeline: ClassConditionalPipeline | UnconditionalPipeline, settings: LikelihoodSettings
) -> dict[str, Any]:
    """The bound of held-out pictures; Improved DDPM (Nichol & Dhariwal 2021), Sec. 3.

    In pixels it is a bound on the length of a lossless code for the picture's bytes. In latents it is one on their
    density, which can be negative and be compared only within the same autoencoder.

    Picture i has the noise of seed + i, whatever the batch size. Writes ``likelihood.json`` in the output folder.

    Args:
        pipeline: on the device that it is to compute on.

    Returns:
        What ``likelihood.json`` holds.

    Raises:
        FileNotFoundError, ValueError: data or settings do not fit; the message says what.
        FileExistsError: the output folder holds something else under that name.
    """
    folder = settings.folder()
    check_report(folder / REPORT)
    bound = Bound(pipeline, process_of(pipeline, settings.steps, settings.variance))
    of_classes = pipeline.unet.config.num_class_embeds is not None
    pictures, left_out = held_out_pictures(settings, folder, "class" if of_classes else "none")
    pictures = pictures[: settings.count]
    figures = measure(bound, pictures, labels_of(pipeline, pictures) if of_classes else None, settings)
    about = {
        "steps": bound.process.num_timesteps,
        "spacing": settings.steps,
        "variance": bound.process.variance_type,
        "of": "pixels" if bound.in_pixels else "latents",
        "seed": settings.seed,
    }
    guessing = 8.0 if bound.in_pixels else GUESSED
    report = write_report(folder / REPORT, settings, pictures, left_out, {**about, "guessing": guessing, **figures})
    logger.info(
        "%d %s of %s (%s), %d steps, variance %s",
        *(len(pictures), "pictures" if bound.in_pixels else "pictures' latents", report["data"]["name"]),
        *(settings.split, about["steps"], about["variance"]),
    )
    for name in ("bits_per_dimension", "guessing", "standard_error", "prior", "between", "decoder"):
        logger.info("  %-18s  %10.4f", name.replace("_", " "), report[name])
    if figures["bits_per_dimension"] >= guessing:
        logger.warning(
            "this is worse than guessing at random, which needs %.4g: train for longer; and without learned variances "
            "(loss=hybrid) few --steps say little of a model",
            guessing,
        )
    return report


def measure(
    bound: Bound, pictures: Sequence[CaptionedPicture], labels: Sequence[int] | None, settings: LikelihoodSettings
) -> dict[str, Any]:
    """Means over the pictures, and of every step."""
    device, size = bound.pipeline._execution_device, settings.batch_size
    height, width = bound.pipeline.picture_size(None, None)
    found: list[BitsPerDimension] = []
    with tqdm(total=len(pictures), desc="measuring", unit="", disable=None, leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(pictures), size):
            chosen = range(start, min(start + size, len(pictures)))
            pixels = torch.stack([read_pixels(pictures[i], width, height) for i in chosen]).to(device)
            given = None if labels is None else torch.tensor([labels[i] for i in chosen], device=device)
            found.append(bound.of(pixels, given, [settings.seed + i for i in chosen]))
            bar.update(len(chosen))
    total, prior = (torch.cat([getattr(one, name) for one in found]).double().cpu() for name in ("total", "prior"))
    terms = torch.cat([one.terms for one in found]).double().cpu().mean(0)  # (T,)
    return {
        "bits_per_dimension": total.mean().item(),
        "standard_error": (total.std() / len(total) ** 0.5).item() if len(total) > 1 else 0.0,
        "prior": prior.mean().item(),
        "between": terms[1:].sum().item(),
        "decoder": terms[0].item(),
        "timesteps": bound.process.model_time(torch.arange(len(terms))).tolist(),
        "terms": terms.tolist(),
    }
