"""Training an autoencoder: pictures in, the same pictures out, through few latents."""

from pathlib import Path

from accelerate.utils import set_seed

from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.pipelines.distributed import processes
from latentdiff.training.batch.batch_types import PixelBatch
from latentdiff.training.batch.choices import PictureOrder, ViewChoice
from latentdiff.training.batch.samples import PixelSamples, batches
from latentdiff.training.card.card import describe
from latentdiff.training.card.kinds import autoencoder_kind
from latentdiff.training.data import CaptionedPicture, NoPicturesError, prepare_pictures
from latentdiff.training.evaluation.reconstruction import Reconstructions
from latentdiff.training.loop.distributed import spread_modules
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.networks import build_autoencoder
from latentdiff.training.objectives.autoencoder import AutoencoderObjective
from latentdiff.training.objectives.discriminator import DiscriminatorObjective
from latentdiff.training.settings import AutoencoderSettings
from latentdiff.training.trainers.alarms import Alarms
from latentdiff.training.trainers.latent_scale import measure_latents


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
    adversary = discriminator = None
    if settings.discriminator_weight > 0:
        discriminator = PatchDiscriminator(
            channels=settings.discriminator_channels,
            layers=settings.discriminator_layers,
            norm=settings.discriminator_norm,
        )
        adversary = DiscriminatorObjective(discriminator, settings)
    objective = AutoencoderObjective(autoencoder, settings, discriminator)
    run = TrainingRun(settings, objective, adversary, settings.discriminator_learning_rate)
    if objective.learner is not None and spread_modules(run.objective):
        raise ValueError("FSDP cannot train a codebook; use several processes without FSDP, or kind=fsq")
    alarms = Alarms()
    reconstructions = Reconstructions(settings, held_out, pictures, objective.perceptual)
    views = ViewChoice(settings, pictures, settings.factor)
    order = PictureOrder([p.weight for p in pictures], run.update_size, settings.seed, views.buckets)
    for batch in batches(run, order, PixelSamples(settings, pictures, views), PixelBatch.cat):
        if figures := run.learn(batch.to(run.device)):
            alarms.add(figures)
        if run.due(settings.sample_every):
            with run.averaged():
                reconstructions.report(run, autoencoder)
            alarms.add_validation(run.figures, adversary is not None and run.step > settings.discriminator_start)
    run.end_training()

    output = Path(settings.output)
    with run.averaged():
        autoencoder = run.whole(autoencoder)
        if run.accelerator.is_main_process:
            measure_latents(autoencoder, pictures, settings)
            autoencoder.save_pretrained(output)
            reconstructions.write(run, output)
            describe(run, settings, autoencoder_kind(settings.kind), len(pictures))
    run.finish()
    return output


def validation_pictures(settings: AutoencoderSettings) -> list[CaptionedPicture]:
    """Those of the split "validation", if there is one."""
    try:
        return prepare_pictures(settings, "validation", condition="none")
    except NoPicturesError:
        return []
