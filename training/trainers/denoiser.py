"""Training a denoiser, conditioned on text, a class or nothing, on the latents of an autoencoder or on pixels."""

from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from latentdiff.codec import Codec
from latentdiff.diffusion import GaussianDiffusion
from latentdiff.diffusion.losses import discretized_gaussian_log_likelihood, gaussian_log_likelihood
from latentdiff.diffusion.process import Process, known_processes
from latentdiff.diffusion.timesteps import LossSecondMoment
from latentdiff.models import DiTTransformer2DModel, PixArtTransformer2DModel
from latentdiff.pipelines.storage.places import text_encoder_at
from latentdiff.training.card.kinds import (
    ModelKind,
    class_conditional_kind,
    short_captions,
    text_to_image_kind,
    unconditional_kind,
)
from latentdiff.training.data.caption_checks import class_names
from latentdiff.training.loop.output_folder import open_output
from latentdiff.training.objectives.diffusion import DenoiserObjective
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.starting_networks import (
    Conditions,
    build_denoiser,
    freeze,
    load_autoencoder,
    made_by,
)
from latentdiff.training.trainers.diffusion import Data, load_data, save_new, train_diffusion
from latentdiff.training.trainers.diffusion_models import (
    ONE_CLASS,
    ClassModel,
    DiffusionModel,
    DiTModel,
    OneClassModel,
    PixArtModel,
    TextModel,
    UnconditionalModel,
)


def train_denoiser(settings: DenoiserSettings) -> Path:
    """Train a denoiser, or go on with a run that `settings.output` holds; returns the pipeline's folder.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be trained on, and what to do.
    """
    open_output(settings)
    codec = Codec(load_autoencoder(settings.autoencoder))
    if settings.resolution % codec.factor:
        raise ValueError(
            f"resolution {settings.resolution} is not divisible by the autoencoder's factor {codec.factor}"
        )
    process = build_process(settings, codec)
    text: Any = text_encoder_at(settings.text_encoder) if settings.condition == "text" else None
    data = load_data(settings, settings.condition)
    model = build_model(settings, codec, process, text, data)
    if settings.gradient_checkpointing:
        model.network.enable_gradient_checkpointing()

    by_loss = settings.timestep_sampler == "loss_second_moment"
    objective = DenoiserObjective(
        model.network,
        process,
        settings.min_snr_gamma,
        p2_gamma=settings.p2_gamma,
        timestep_sampler=LossSecondMoment(process.num_timesteps) if by_loss else None,
    )
    save = partial(save_new, model, settings)
    return train_diffusion(settings, model, data, objective, save, kind_of(model, settings, data))


def build_process(settings: DenoiserSettings, codec: Codec) -> Process:
    """The diffusion process that the settings describe, for what `codec` encodes.

    Raises:
        ValueError: there is no such process, or it does not take these arguments.
    """
    if settings.process != GaussianDiffusion.name:
        return made_by(known_processes(), "process", settings.process, **settings.process_options)
    return GaussianDiffusion(
        settings.noise_schedule,
        settings.num_train_timesteps,
        settings.prediction_type,
        settings.zero_terminal_snr,
        variance_type="learned_range" if settings.learns_variance else "fixed_small",
        loss_type=settings.loss,
        log_likelihood=discretized_gaussian_log_likelihood if codec.is_identity else gaussian_log_likelihood,
    )


def build_model(settings: DenoiserSettings, codec: Codec, process: Process, text: Any, data: Data) -> DiffusionModel:
    """A new network with its first weights, what conditions it, and its scheduler; what is not trained is frozen.

    text: tokenizer and text encoder, with condition=text.

    Raises:
        ValueError: the captions are no classes.
    """
    scheduler = process.scheduler()
    freeze(codec.autoencoder)
    if settings.condition == "text":
        tokenizer, text_encoder = text
        freeze(text_encoder)
        set_seed(settings.seed)
        network = build_denoiser(settings, codec, process, Conditions(text_width=text_encoder.config.hidden_size))
        text_model = PixArtModel if isinstance(network, PixArtTransformer2DModel) else TextModel
        return text_model(codec, network, scheduler, process, tokenizer, text_encoder)
    if codec.is_identity and "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=True)
    classes = class_names(data.pictures) if settings.condition == "class" else []
    set_seed(settings.seed)
    network = build_denoiser(settings, codec, process, Conditions(classes=len(classes)))
    is_dit = isinstance(network, DiTTransformer2DModel)
    if classes:
        return (DiTModel if is_dit else ClassModel)(codec, network, scheduler, process, classes)
    return (OneClassModel if is_dit else UnconditionalModel)(codec, network, scheduler, process)


def kind_of(model: DiffusionModel, settings: DenoiserSettings, data: Data) -> ModelKind:
    """What is trained, for its card."""
    match model:
        case ClassModel():
            return class_conditional_kind(model.classes)
        case OneClassModel():
            return class_conditional_kind([ONE_CLASS])
        case UnconditionalModel():
            return unconditional_kind()
    pipeline = model.pipeline()
    return text_to_image_kind(
        [*settings.sample_prompts, *short_captions(data.pictures)],
        saved_as=pipeline.saved_class_name,
        told=pipeline.diffusers_options,
        scaled=hasattr(pipeline.scheduler, "init_noise_sigma"),
    )
