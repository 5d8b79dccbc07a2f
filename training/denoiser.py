"""Training a text-conditioned denoiser on the latents of an autoencoder."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from latentdiff.diffusion import GaussianDiffusion, build_scheduler
from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.models import AutoencoderKL, UNet2DConditionModel, VQModel
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.text import encode_prompts, load_text_encoder
from latentdiff.training.cache import Autoencoder, LatentCache, TextCache, cached, encode_latents, latents_key, text_key
from latentdiff.training.config import DenoiserSettings
from latentdiff.training.data import BatchOrder, CaptionedPicture, load_pictures
from latentdiff.training.run import TrainingRun

logger = logging.getLogger(__name__)

AUTOENCODERS: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
DRAWS = 0  # stream of TrainingRun.generator


def build_process(settings: DenoiserSettings) -> GaussianDiffusion:
    """The diffusion process that the settings describe."""
    return GaussianDiffusion(
        settings.noise_schedule, settings.num_train_timesteps, settings.prediction_type, settings.zero_terminal_snr
    )


def build_unet(settings: DenoiserSettings, autoencoder: Autoencoder, text_width: int) -> UNet2DConditionModel:
    """A new UNet for the autoencoder's latents and text states of width `text_width`."""
    config = autoencoder.config
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in settings.attention_levels]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(settings.attention_levels)]
    heads = [max(1, channels // settings.attention_head_dim) for channels in settings.block_out_channels]
    return UNet2DConditionModel(
        sample_size=settings.resolution // pixels_per_latent(autoencoder),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        transformer_layers_per_block=settings.transformer_layers_per_block,
        attention_head_dim=tuple(heads),  # diffusers' name for the number of heads
        cross_attention_dim=text_width,
        norm_num_groups=settings.norm_num_groups,
        use_linear_projection=True,
    )


def pixels_per_latent(autoencoder: Autoencoder) -> int:
    """Pixels per latent along one side, of any autoencoder."""
    return int(2 ** (len(autoencoder.config.block_out_channels) - 1))


class DenoiserObjective(nn.Module):
    """The squared error of the network's prediction, weighted by min-SNR where the settings ask for it."""

    def __init__(self, unet: nn.Module, process: GaussianDiffusion, min_snr_gamma: float | None) -> None:
        super().__init__()
        self.unet = unet
        self.process = process
        self.min_snr_gamma = min_snr_gamma

    def forward(self, latents: Tensor, noise: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """latents, noise: (B, C, h, w); timesteps: (B,); encoder_hidden_states: (B, L, D). Returns a float32 scalar."""
        noisy = self.process.q_sample(latents, timesteps, noise)
        prediction = self.unet(noisy, timesteps, encoder_hidden_states).sample.float()
        target = self.process.training_target(latents, timesteps, noise)
        loss = (prediction - target).square().mean(dim=(1, 2, 3))  # (B,)
        if self.min_snr_gamma is not None:
            loss = loss * self.process.min_snr_weight(timesteps, self.min_snr_gamma)
        return loss.mean()


class Draws:
    """What each pass trains on: latents, noise, timesteps and text states, all functions of the pass number."""

    def __init__(
        self,
        run: TrainingRun,
        settings: DenoiserSettings,
        pictures: Sequence[CaptionedPicture],
        latents: LatentCache,
        text: TextCache,
    ) -> None:
        self.run, self.settings, self.pictures, self.latents, self.text = run, settings, pictures, latents, text
        accelerator = run.accelerator
        weights = [picture.weight for picture in pictures]
        index, count = accelerator.process_index, accelerator.num_processes
        self.order = BatchOrder(weights, settings.batch_size, settings.seed, index, count)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(latents, noise, timesteps, text states) of pass `number`, on the run's device."""
        generator = self.run.generator(DRAWS, number)
        indices = self.order.batch(number)
        latents = self.latents.sample(indices, generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = self._stratified_timesteps(generator)
        text = self.text[[self._caption(self.pictures[i].captions, generator) for i in indices]]
        device = self.run.device
        return latents.to(device), noise.to(device), timesteps.to(device), text.to(device)

    def _stratified_timesteps(self, generator: torch.Generator) -> Tensor:
        """One timestep in each of B equal bands, in random order: uniform, with less variance. (B,) long

        Variational Diffusion Models (Kingma et al. 2021), App. I.1.
        """
        size, steps = self.settings.batch_size, self.settings.num_train_timesteps
        bands = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        return (bands * steps).long().clamp(max=steps - 1)

    def _caption(self, captions: Sequence[str], generator: torch.Generator) -> str:
        """One of a picture's captions, or the empty one by the chance of `caption_dropout`."""
        drop, which = torch.rand(2, generator=generator).tolist()
        return "" if drop < self.settings.caption_dropout else captions[int(which * len(captions))]


def train_denoiser(settings: DenoiserSettings) -> Path:
    """Train a denoiser, or go on with a run that `settings.output` holds; returns the pipeline's folder.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be trained on, and what to do.
    """
    set_seed(settings.seed)  # the first weights, and whatever draws without a generator of its own
    pictures = load_pictures(settings.data, settings.split, settings.image_column, settings.caption_column)
    autoencoder = load_autoencoder(settings.autoencoder)
    factor = pixels_per_latent(autoencoder)
    if settings.resolution % factor:
        raise ValueError(f"resolution {settings.resolution} is not divisible by the autoencoder's factor {factor}")
    tokenizer, text_encoder = cast(tuple[Any, Any], load_text_encoder(settings.text_encoder))
    process = build_process(settings)
    unet = build_unet(settings, autoencoder, text_encoder.config.hidden_size)
    run = TrainingRun(settings, DenoiserObjective(unet, process, settings.min_snr_gamma), unet)
    autoencoder.to(run.device).eval()
    text_encoder.to(run.device).eval()

    draws = Draws(run, settings, pictures, *caches(run, settings, pictures, autoencoder, tokenizer, text_encoder))
    parts = {
        "vae": autoencoder,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": build_scheduler(process),
    }
    for number in run.passes():
        run.learn(*draws[number])
        if run.due(settings.sample_every):
            with run.averaged() as averaged:
                draw_samples(run, settings, pictures, TextToImagePipeline(unet=averaged, **parts))
    run.save()

    output = Path(settings.output)
    with run.averaged() as averaged:
        if run.accelerator.is_main_process:
            pipeline = TextToImagePipeline(unet=averaged, **parts)
            pipeline.register_defaults(
                num_inference_steps=settings.sample_steps, guidance_scale=settings.sample_guidance_scale
            )
            draw_samples(run, settings, pictures, pipeline)
            pipeline.save_pretrained(output)
    run.accelerator.wait_for_everyone()
    return output


def load_autoencoder(folder: str) -> Autoencoder:
    """The autoencoder in `folder`, or in the ``vae`` folder of a pipeline there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a model of another class.
    """
    for candidate in (Path(folder), Path(folder) / "vae"):
        if (candidate / "config.json").is_file():
            kind = json.loads((candidate / "config.json").read_text(encoding="utf-8")).get("_class_name")
            if kind not in AUTOENCODERS:
                raise ValueError(f"{candidate}: its config.json is of a {kind}, not of {' or '.join(AUTOENCODERS)}")
            return AUTOENCODERS[kind].from_pretrained(candidate)
    raise FileNotFoundError(
        f"{folder}: no autoencoder found (no config.json there or in its vae/); train one with "
        f"'latentdiff train autoencoder --output {folder}'"
    )


def caches(
    run: TrainingRun,
    settings: DenoiserSettings,
    pictures: Sequence[CaptionedPicture],
    autoencoder: Autoencoder,
    tokenizer: Any,
    text_encoder: Any,
) -> tuple[LatentCache, TextCache]:
    """Latents and text states of the data, encoded on the first run and read on the next."""
    folder = Path(settings.cache_dir) if settings.cache_dir else run.folder / "cache"
    flip, resolution = settings.random_flip, settings.resolution
    captions = sorted({caption for picture in pictures for caption in picture.captions} | {""})

    def encode_captions() -> Tensor:
        with torch.no_grad():
            chunks = [captions[i : i + 64] for i in range(0, len(captions), 64)]
            return torch.cat([encode_prompts(c, tokenizer, text_encoder).half().cpu() for c in chunks])

    with run.accelerator.main_process_first():
        latents_file = folder / f"latents-{latents_key(pictures, autoencoder, resolution, flip)}.safetensors"
        moments = cached(latents_file, lambda: encode_latents(pictures, autoencoder, resolution, flip))
        text_file = folder / f"text-{text_key(captions, text_encoder, tokenizer.model_max_length)}.safetensors"
        states = cached(text_file, encode_captions)
    return LatentCache(moments), TextCache(captions, states)


def draw_samples(
    run: TrainingRun, settings: DenoiserSettings, pictures: Sequence[CaptionedPicture], pipeline: TextToImagePipeline
) -> None:
    """Draw the sample prompts (by default, captions of the first pictures) with seed 0, and record the loss."""
    prompts = list(settings.sample_prompts) or [picture.captions[0] for picture in pictures[:16]]
    pipeline.set_progress_bar_config(disable=True)
    output: Any = pipeline(
        prompts,
        height=settings.resolution,
        width=settings.resolution,
        num_inference_steps=settings.sample_steps,
        guidance_scale=settings.sample_guidance_scale,
        seed=0,
    )
    save_picture(image_grid(output.images, 8), run.folder / "samples" / f"step-{run.step:08d}.png")
    run.record()
