"""Training an autoencoder: pictures in, the same pictures out, through few latents."""

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from latentdiff.models import AutoencoderKL, FSQModel, GumbelVQModel, VQModel
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.pipelines.processes import processes
from latentdiff.training.alarms import Alarms
from latentdiff.training.autoencoder_objective import AutoencoderObjective, Judge
from latentdiff.training.config import AutoencoderSettings
from latentdiff.training.data import CaptionedPicture, NoPicturesError, prepare_pictures
from latentdiff.training.describe import describe
from latentdiff.training.draws import POSTERIOR, PixelSamples, Views, loader, sample_generator, stack
from latentdiff.training.latent_scale import measure_latents
from latentdiff.training.order import PictureOrder
from latentdiff.training.processes import spread_modules
from latentdiff.training.reconstruction import Reconstructions
from latentdiff.training.run import TrainingRun


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
            return GumbelVQModel(
                **shape,
                num_vq_embeddings=settings.num_vq_embeddings,
                logit_laplace=settings.logit_laplace_weight > 0,
            )
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
        pictures = prepare_pictures(settings, condition="none")
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
    if objective.learner is not None and spread_modules(run.objective):
        raise ValueError("FSDP cannot train a codebook; use several processes without FSDP, or kind=fsq")
    alarms = Alarms()

    def statistics() -> dict[str, float]:
        figures = objective.report() | ({} if judge is None else judge.report())
        alarms.hear(figures)
        return figures

    run.statistics = statistics
    reconstructions = Reconstructions(settings, held_out, pictures, objective.perceptual)

    views = Views(settings, pictures, settings.factor)
    order = PictureOrder([p.weight for p in pictures], run.update_size, settings.seed, views.buckets)
    for _, batch in loader(run, order, PixelSamples(settings, pictures, views), stack):
        generators = [sample_generator(settings, place, POSTERIOR) for place in batch["place"]]
        run.learn(batch["pixels"].to(run.device), generators, step=run.step, names=batch["name"])
        if run.due(settings.sample_every):
            with run.averaged():
                reconstructions.report(run, autoencoder)
            alarms.hear_validation(run.figures, judge is not None and run.step > settings.discriminator_start)
    run.end_training()

    output = Path(settings.output)
    with run.averaged():
        autoencoder = run.whole(autoencoder)
        if run.accelerator.is_main_process:
            measure_latents(autoencoder, pictures, settings)
            autoencoder.save_pretrained(output)
            reconstructions.write(run, output)
            describe(run, settings, f"{settings.kind.upper()} autoencoder", len(pictures))
    run.finish()
    return output


def validation_pictures(settings: AutoencoderSettings) -> list[CaptionedPicture]:
    """Those of the split "validation", if there is one."""
    try:
        return prepare_pictures(settings, "validation", condition="none")
    except NoPicturesError:
        return []
