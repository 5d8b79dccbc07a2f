"""Training a denoiser that is there already, new or not: what ``train denoiser`` and ``finetune`` share."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from latentdiff.diffusion import GaussianDiffusion
from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.pipelines.processes import processes
from latentdiff.training.config import Condition, DiffusionSettings
from latentdiff.training.data import CaptionedPicture, NoPicturesError, prepare_pictures
from latentdiff.training.draws import DiffusionSamples, Views, chunks_alike, held_out_samples, loader, stack
from latentdiff.training.inputs import Inputs, all_views, centred_views, open_sources, pixels_per_latent
from latentdiff.training.order import PictureOrder
from latentdiff.training.processes import spread_modules
from latentdiff.training.run import TrainingRun
from latentdiff.training.validation import HeldOutLoss

logger = logging.getLogger(__name__)

BANDS = 4  # of timesteps, in which the held-out loss is told apart


@dataclass
class Parts:
    """The networks of a pipeline, and the process that its scheduler samples from."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    process: GaussianDiffusion
    read_caption: Any = None
    """Where there is no text encoder: caption -> dict of what the network is told."""
    held_out_figures: ClassVar[tuple[str, ...]] = ("val_loss",)
    """What the objective gives of each held-out picture."""

    def pipeline(self) -> Any:
        """A pipeline of these very networks."""
        return TextToImagePipeline(self.vae, self.text_encoder, self.tokenizer, self.unet, self.scheduler)

    def draw(self, prompts: list[str], settings: DiffusionSettings, device: torch.device) -> list[Any]:
        """A picture of each prompt, with seed 0."""
        return self._pictures(device, settings, prompts, guidance_scale=settings.sample_guidance_scale)

    def _pictures(self, device: torch.device, settings: DiffusionSettings, *args: Any, **call: Any) -> list[Any]:
        pipeline = self.pipeline().to(device)
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": settings.resolution, "width": settings.resolution}
        return pipeline(*args, **size, num_inference_steps=settings.sample_steps, seed=0, **call).images


@dataclass
class Data:
    """Pictures to train on, and others to measure on."""

    pictures: list[CaptionedPicture]
    held_out: list[CaptionedPicture]


def load_data(settings: DiffusionSettings, condition: Condition = "text") -> Data:
    """The usable pictures of both splits; one process looks at them first, the others read what it found."""
    with processes().main_process_first():
        pictures = prepare_pictures(settings, condition=condition)
        seen = {picture.digest for picture in pictures}
        try:
            held_out = prepare_pictures(settings, "validation", condition)
        except NoPicturesError as error:
            logger.info("no held-out pictures: %s", error)
            held_out = []
    return Data(pictures, [picture for picture in held_out if picture.digest not in seen])


def train_diffusion(
    settings: DiffusionSettings,
    parts: Parts,
    data: Data,
    objective: nn.Module,
    finish: Callable[[TrainingRun], None],
    *,
    text_is_trained: bool = False,
    prepare_caption: Callable[[str], str] | None = None,
) -> Path:
    """Train what in `objective` asks for a gradient, or go on with the run that ``settings.output`` holds.

    Args:
        parts: the networks; those that are trained are the very ones in `objective`, the others are frozen.
        objective: called with what `DenoiserObjective` takes.
        finish: called once at the end, on the main process, with the averaged weights in place; saves the result.
        text_is_trained: the objective has the text encoder, and takes tokens in place of text states.
        prepare_caption: what is done to a caption before it becomes tokens.

    Returns:
        ``settings.output``.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be trained on, and what to do.
        FloatingPointError: the loss went bad; see `TrainingRun.learn`.
    """
    factor = pixels_per_latent(parts.vae)
    step = factor * 2 ** (len(parts.unet.config.block_out_channels) - 1)  # halved at every level but the last
    run = TrainingRun(settings, objective)
    if spread_modules(run.objective) and (text_is_trained or hasattr(parts.unet, "peft_config")):
        raise ValueError("under FSDP only a whole UNet can be trained, no LoRA and no text encoder; use DDP")
    variants = settings.cached_variants if settings.cache_latents else 0
    views = Views(settings, data.pictures, step if settings.buckets else factor, variants)
    other_views = Views(settings, data.held_out, step if settings.buckets else factor)
    wanted = all_views(views, data.pictures) + centred_views(other_views, data.held_out)
    sources = open_sources(
        run,
        settings,
        wanted,
        parts.vae,
        parts.tokenizer,
        parts.text_encoder,
        text_is_trained,
        prepare_caption,
        parts.read_caption,
    )
    inputs = Inputs(parts.vae, parts.tokenizer, parts.text_encoder, sources, run.device)

    def samples_of(pictures: Sequence[CaptionedPicture], views: Views) -> DiffusionSamples:
        return DiffusionSamples(
            settings,
            pictures,
            views,
            sources,
            latent_channels=parts.vae.config.latent_channels,
            factor=factor,
            num_timesteps=parts.process.num_timesteps,
            update_size=run.update_size,
        )

    order = PictureOrder([p.weight for p in data.pictures], run.update_size, settings.seed, views.buckets)
    check = Check(run, settings, parts, samples_of(data.held_out, other_views), inputs, data.pictures)
    for _, batch in loader(run, order, samples_of(data.pictures, views), stack):
        run.learn(**inputs(batch))
        if run.due(settings.sample_every):
            check()
    run.end_training()
    with run.averaged():
        parts.unet = run.whole(parts.unet)
        if run.accelerator.is_main_process:
            finish(run)
    run.finish()
    return Path(settings.output)


class Check:
    """Now and then: the loss on held-out pictures, and a grid of samples drawn by the pipeline that will be saved."""

    def __init__(
        self,
        run: TrainingRun,
        settings: DiffusionSettings,
        parts: Parts,
        held_out: DiffusionSamples,
        inputs: Inputs,
        pictures: Sequence[CaptionedPicture],
    ) -> None:
        self.run, self.settings, self.parts = run, settings, parts
        self.prompts = list(settings.sample_prompts) or [picture.captions[0] for picture in pictures[:16]]
        bands = min(BANDS, parts.process.num_timesteps)
        self.loss = HeldOutLoss(parts.process, bands, parts.held_out_figures)
        idle = ((parts.vae, inputs.autoencoder), (parts.text_encoder, inputs.text_encoder))
        self.resting = [
            network for network, used in idle if used is None and network is not None and not is_trained(network)
        ]
        self.batches = [inputs(stack(chunk)) for chunk in chunks_alike(held_out_samples(held_out, bands))]

    def __call__(self) -> None:
        """Record the held-out loss, and draw."""
        run = self.run
        with run.averaged():
            figures = self.loss(run.objective, self.batches, run.accelerator)
            if run.takes_part:
                self.draw()
        run.measured(figures)
        run.accelerator.wait_for_everyone()

    def draw(self) -> None:
        """Draw the sample prompts with seed 0."""
        settings, run = self.settings, self.run
        images = self.parts.draw(self.prompts, settings, run.device)
        for network in self.resting:  # a GPU's memory is the denoiser's
            network.to("cpu")
        if not run.accelerator.is_main_process:
            return
        file = run.folder / "samples" / f"step-{run.step:08d}.png"
        save_picture(image_grid(images, 8), file)
        run.show("samples", file)


def is_trained(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())
