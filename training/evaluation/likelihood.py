"""The likelihood of held-out pictures in bits per dimension: by its variational bound, or that of a flow itself."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.codec import Codec
from latentdiff.diffusion import GaussianDiffusion, RectifiedFlow, bits_per_dimension, process_from_config
from latentdiff.diffusion.losses import BitsPerDimension, discretized_gaussian_log_likelihood, gaussian_log_likelihood
from latentdiff.diffusion.probability_flow import log_likelihood, random_signs
from latentdiff.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.data.caption_checks import labels_of
from latentdiff.training.evaluation.held_out import check_report, held_out_pictures, was_trained_on, write_report
from latentdiff.training.settings import LikelihoodSettings

logger = logging.getLogger(__name__)

REPORT = "likelihood.json"
FLOW_STEPS = 25
GUESSED = 0.5 * math.log2(2 * math.pi * math.e)
"""Bits per dimension of latents for who knows but their mean and variance, which are 0 and 1."""


@dataclass(frozen=True)
class Measured(ABC):
    """A model without text, and how its likelihood is measured."""

    pipeline: ClassConditionalPipeline | UnconditionalPipeline

    @property
    def in_pixels(self) -> bool:
        return self.pipeline.vqvae is None

    def prediction(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """What the UNet gives, (B, C, h, w) or twice the channels, float32."""
        unet = self.pipeline.unet
        given = {} if class_labels is None else {"class_labels": class_labels}
        return unet(x.to(unet.dtype), timestep=timesteps, return_dict=False, **given)[0].float()

    def start(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The pixels, or their latents."""
        return pixels if self.in_pixels else Codec(self.pipeline.vae).encode(pixels, generators).float()

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """For the report: how it is measured."""

    @abstractmethod
    def of(self, pixels: Tensor, class_labels: Tensor | None, generators: list[torch.Generator]) -> Any:
        """Of pictures (B, 3, H, W) in [-1, 1], each with the noise of its generator; `class_labels` (B,)."""

    @abstractmethod
    def figures(self, found: Sequence[Any]) -> dict[str, Any]:
        """For the report: means over the pictures, of what `of` gave batch by batch."""


@dataclass(frozen=True)
class Bound(Measured):
    """The variational bound of a Gaussian process."""

    process: GaussianDiffusion

    def prediction(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """(B, C, h, w), or twice the channels where the process takes the variances that the UNet has learned."""
        found = super().prediction(x, timesteps, class_labels)
        return found if self.process.learns_variance else found[:, : x.shape[1]]

    def about(self) -> dict[str, Any]:
        return {"steps": self.process.num_timesteps, "variance": self.process.variance_type}

    def of(self, pixels: Tensor, class_labels: Tensor | None, generators: list[torch.Generator]) -> BitsPerDimension:
        return bits_per_dimension(
            self.process,
            lambda x, timesteps: self.prediction(x, timesteps, class_labels),
            self.start(pixels, generators),
            generators,
            discretized_gaussian_log_likelihood if self.in_pixels else gaussian_log_likelihood,
            clip_denoised=self.in_pixels,
        )

    def figures(self, found: Sequence[BitsPerDimension]) -> dict[str, Any]:
        total, prior = (torch.cat([getattr(one, name) for one in found]) for name in ("total", "prior"))
        terms = torch.cat([one.terms for one in found]).double().cpu().mean(0)  # (T,)
        return {
            **mean_and_error(total),
            "prior": prior.double().mean().item(),
            "between": terms[1:].sum().item(),
            "decoder": terms[0].item(),
            "timesteps": self.process.model_time(torch.arange(len(terms))).tolist(),
            "terms": terms.tolist(),
        }


@dataclass(frozen=True)
class Density(Measured):
    """The density of a rectified flow, by the differential equation that leads pictures to noise.

    Pixels are whole numbers; each gets uniform noise of its own width, so that the bits are a bound on those of a code
    (Theis et al. 2016, Sec. 3.1).
    """

    process: RectifiedFlow
    steps: int

    def about(self) -> dict[str, Any]:
        return {"steps": self.steps, "variance": None}

    def of(self, pixels: Tensor, class_labels: Tensor | None, generators: list[torch.Generator]) -> Tensor:
        start, width = self.start(pixels, generators), 1 / 127.5
        if self.in_pixels:
            uniform = [torch.rand(start.shape[1:], generator=generator) for generator in generators]
            start = start + width * (torch.stack(uniform).to(start) - 0.5)
        probe = random_signs(start, generators)

        def model(x: Tensor, timesteps: Tensor) -> Tensor:
            return self.prediction(x, timesteps, class_labels)

        nats = log_likelihood(self.process, model, start, probe, self.steps)
        return -nats / math.log(2) / start[0].numel() - (math.log2(width) if self.in_pixels else 0.0)

    def figures(self, found: Sequence[Tensor]) -> dict[str, Any]:
        return mean_and_error(torch.cat(list(found)))


def mean_and_error(bits: Tensor) -> dict[str, float]:
    """Of the pictures' bits per dimension (B,)."""
    bits = bits.double().cpu()
    error = (bits.std() / len(bits) ** 0.5).item() if len(bits) > 1 else 0.0
    return {"bits_per_dimension": bits.mean().item(), "standard_error": error}


def measured_on(pipeline: Any, steps: str | None, variance: str | None) -> Measured:
    """What is measured on a pipeline: its scheduler's process says.

    Raises:
        ValueError: steps or a variance that it does not have.
    """
    process = process_from_config({"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config})
    if not isinstance(process, RectifiedFlow):
        return Bound(pipeline, process_of(pipeline, steps, variance))
    if variance is not None:
        raise ValueError(f"--variance {variance}: the steps of a flow have none; leave it out")
    if steps is not None and not (steps.isdecimal() and int(steps) > 0):
        raise ValueError(f"--steps {steps}: a flow is followed in a number of even steps, such as {FLOW_STEPS}")
    return Density(pipeline, process, FLOW_STEPS if steps is None else int(steps))


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
    """The bound of held-out pictures (Improved DDPM, Nichol & Dhariwal 2021, Sec. 3), or their density by a flow.

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
    measured = measured_on(pipeline, settings.steps, settings.variance)
    of_classes = getattr(pipeline, "class_embeds", None) is not None
    pictures, left_out = held_out_pictures(settings, folder, "class" if of_classes else "none")
    pictures = pictures[: settings.count]
    figures = measure(measured, pictures, labels_of(pipeline, pictures) if of_classes else None, settings)
    steps, variance = measured.about().values()
    of = "pixels" if measured.in_pixels else "latents"
    about = {"steps": steps, "spacing": settings.steps, "variance": variance, "of": of, "seed": settings.seed}
    guessing = 8.0 if measured.in_pixels else GUESSED
    report = write_report(folder / REPORT, settings, pictures, left_out, {**about, "guessing": guessing, **figures})
    logger.info(
        "%d %s of %s (%s), %d steps%s",
        *(len(pictures), "pictures" if measured.in_pixels else "pictures' latents", report["data"]["name"]),
        *(settings.split, steps, "" if variance is None else f", variance {variance}"),
    )
    shown = ("bits_per_dimension", "guessing", "standard_error", "prior", "between", "decoder")
    for name in (one for one in shown if one in report):
        logger.info("  %-18s  %10.4f", name.replace("_", " "), report[name])
    if was_trained_on(settings):
        logger.warning("these are pictures that the model was trained on: others will be less likely")
    if figures["bits_per_dimension"] >= guessing:
        fixed = "; and without learned variances (loss=hybrid) few --steps say little of a model"
        more = fixed if variance in ("fixed_small", "fixed_large") else ""  # neither learned nor, as of a flow, none
        logger.warning("this is worse than guessing at random, which needs %.4g: train for longer%s", guessing, more)
    return report


def measure(
    measured: Measured, pictures: Sequence[CaptionedPicture], labels: Sequence[int] | None, settings: LikelihoodSettings
) -> dict[str, Any]:
    """Means over the pictures, and of a bound's every step."""
    device, size = measured.pipeline._execution_device, settings.batch_size
    height, width = measured.pipeline.picture_size(None, None)
    found: list[Any] = []
    with tqdm(total=len(pictures), desc="measuring", unit="", disable=None, leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(pictures), size):
            chosen = range(start, min(start + size, len(pictures)))
            pixels = torch.stack([read_pixels(pictures[i], width, height) for i in chosen]).to(device)
            given = None if labels is None else torch.tensor([labels[i] for i in chosen], device=device)
            found.append(measured.of(pixels, given, [torch.Generator().manual_seed(settings.seed + i) for i in chosen]))
            bar.update(len(chosen))
    return measured.figures(found)
