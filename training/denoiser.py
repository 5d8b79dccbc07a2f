"""Training a denoiser, told a text, a class or nothing, on the latents of an autoencoder or on pixels."""

import json
from pathlib import Path
from typing import Any, cast

from accelerate.utils import set_seed

from latentdiff.diffusion import GaussianDiffusion, build_scheduler
from latentdiff.diffusion.bounds import discretized_gaussian_log_likelihood, gaussian_log_likelihood
from latentdiff.diffusion.losses import LogLikelihood
from latentdiff.diffusion.timesteps import LossSecondMoment
from latentdiff.models import IdentityAutoencoder, UNet2DConditionModel
from latentdiff.pipelines.storage.loading import OUR_CLASSES, OURS_ALONE
from latentdiff.text import load_text_encoder
from latentdiff.training.config import DenoiserSettings
from latentdiff.training.describe import describe
from latentdiff.training.diffusion_run import Data, Parts, load_data, train_diffusion
from latentdiff.training.inputs import Autoencoder, frozen, pixels_per_latent
from latentdiff.training.objective import DenoiserObjective
from latentdiff.training.run import TrainingRun
from latentdiff.training.textless import (
    ClassLabels,
    TextlessParts,
    build_textless_unet,
    class_names,
    is_pixels,
    nothing,
)

KINDS = {
    "text": "text-to-image pipeline",
    "class": "class-conditional image pipeline",
    "none": "unconditional image pipeline",
}
AUTOENCODERS = OUR_CLASSES["vae"] + OURS_ALONE["vae"]


def build_process(settings: DenoiserSettings) -> GaussianDiffusion:
    """The diffusion process that the settings describe."""
    return GaussianDiffusion(
        settings.noise_schedule,
        settings.num_train_timesteps,
        settings.prediction_type,
        settings.zero_terminal_snr,
        variance_type="learned_range" if settings.learns_variance else "fixed_small",
        loss_type=settings.loss,
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
        out_channels=config.latent_channels * (2 if settings.learns_variance else 1),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        transformer_layers_per_block=settings.transformer_layers_per_block,
        attention_head_dim=tuple(heads),  # diffusers' name for the number of heads
        cross_attention_dim=text_width,
        norm_num_groups=settings.norm_num_groups,
        use_linear_projection=True,
        resnet_time_scale_shift=settings.resnet_time_scale_shift,
    )


def train_denoiser(settings: DenoiserSettings) -> Path:
    """Train a denoiser, or go on with a run that `settings.output` holds; returns the pipeline's folder.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be trained on, and what to do.
    """
    autoencoder = load_autoencoder(settings.autoencoder)
    factor = pixels_per_latent(autoencoder)
    if settings.resolution % factor:
        raise ValueError(f"resolution {settings.resolution} is not divisible by the autoencoder's factor {factor}")
    process = build_process(settings)
    text = cast(tuple[Any, Any], load_text_encoder(settings.text_encoder)) if settings.condition == "text" else None
    data = load_data(settings, settings.condition)
    parts = build_parts(settings, autoencoder, process, text, data)
    if settings.gradient_checkpointing:
        parts.unet.enable_gradient_checkpointing()

    def finish(run: TrainingRun) -> None:
        pipeline = parts.pipeline()
        defaults: dict[str, float] = {"num_inference_steps": settings.sample_steps}
        if settings.condition != "none":
            defaults["guidance_scale"] = settings.sample_guidance_scale
        pipeline.register_defaults(**defaults)
        pipeline.save_pretrained(settings.output)
        describe(run, settings, KINDS[settings.condition], len(data.pictures))

    by_loss = settings.timestep_sampler == "loss_second_moment"
    objective = DenoiserObjective(
        parts.unet,
        process,
        settings.min_snr_gamma,
        p2_gamma=settings.p2_gamma,
        timestep_sampler=LossSecondMoment(process.num_timesteps) if by_loss else None,
        log_likelihood=likelihood_of(autoencoder),
        takes_text=settings.condition == "text",
    )
    return train_diffusion(settings, parts, data, objective, finish)


def build_parts(
    settings: DenoiserSettings,
    autoencoder: Autoencoder,
    process: GaussianDiffusion,
    text: tuple[Any, Any] | None,
    data: Data,
) -> Parts:
    """A new network with its first weights, what conditions it, and its scheduler; what is not trained is frozen.

    text: tokenizer and text encoder, with condition=text.

    Raises:
        ValueError: the captions are no classes.
    """
    scheduler = build_scheduler(process, sampler_of(settings))
    frozen(autoencoder)
    if text is not None:
        tokenizer, text_encoder = text
        frozen(text_encoder)
        set_seed(settings.seed)
        unet = build_unet(settings, autoencoder, text_encoder.config.hidden_size)
        return Parts(autoencoder, text_encoder, tokenizer, unet, scheduler, process)
    if is_pixels(autoencoder):
        scheduler.register_to_config(clip_sample=True)
    classes = class_names(data.pictures) if settings.condition == "class" else []
    read = ClassLabels({name: i for i, name in enumerate(classes)}) if classes else nothing
    set_seed(settings.seed)
    network = build_textless_unet(settings, autoencoder, len(classes))
    return TextlessParts(autoencoder, None, None, network, scheduler, process, read, classes)


def likelihood_of(autoencoder: Autoencoder) -> LogLikelihood:
    """Of the last step: pixels are whole numbers, latents are not."""
    if is_pixels(autoencoder):
        return discretized_gaussian_log_likelihood
    return gaussian_log_likelihood


def sampler_of(settings: DenoiserSettings) -> str:
    """The scheduler that a new model is saved with."""
    return "DDPMScheduler" if settings.learns_variance else "DDIMScheduler"


def load_autoencoder(folder: str) -> Autoencoder:
    """The autoencoder in `folder`, or in the ``vae`` or ``vqvae`` folder of a pipeline there; one that does nothing for
    "pixels".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a model of another class, or its latents are not what its config says of them.
    """
    from latentdiff import models

    if folder == "pixels":
        return IdentityAutoencoder()
    for candidate in (Path(folder), Path(folder) / "vae", Path(folder) / "vqvae"):
        if (candidate / "config.json").is_file():
            kind = json.loads((candidate / "config.json").read_text(encoding="utf-8")).get("_class_name")
            if kind not in AUTOENCODERS:
                raise ValueError(f"{candidate}: its config.json is of a {kind}, not of {' or '.join(AUTOENCODERS)}")
            autoencoder = getattr(models, kind).from_pretrained(candidate)
            check_latents(candidate, autoencoder.config)
            return cast(Autoencoder, autoencoder)
    raise FileNotFoundError(
        f"{folder}: no autoencoder found (no config.json there or in its vae/); train one with "
        f"'latentdiff train autoencoder --output {folder}'"
    )


def check_latents(folder: Path, config: Any) -> None:
    """Raises ValueError if codes have another number of channels than ``latent_channels``, by which pipelines go."""
    channels = len(config["levels"]) if "levels" in config else config.get("vq_embed_dim") or config["latent_channels"]
    if channels != config["latent_channels"]:
        key = "levels" if "levels" in config else "vq_embed_dim"
        raise ValueError(
            f"{folder}: its latents have {channels} channels ({key}) and latent_channels={config['latent_channels']}; "
            f"pipelines draw with autoencoders where both are the same"
        )
