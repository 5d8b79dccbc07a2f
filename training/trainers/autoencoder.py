"""Training an autoencoder: pictures in, the same pictures out, through few latents."""

import logging
from collections.abc import Mapping
from pathlib import Path

from accelerate.utils import set_seed

from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.pipelines.distributed import processes
from latentdiff.training.batch.batch_loader import PixelSamples, batches
from latentdiff.training.batch.batch_types import PixelBatch
from latentdiff.training.batch.latents import latents_digest
from latentdiff.training.batch.random_choices import PictureOrder, ViewChoice
from latentdiff.training.card.card import describe
from latentdiff.training.card.kinds import autoencoder_kind
from latentdiff.training.data import prepare_splits
from latentdiff.training.data.picture_table import weights
from latentdiff.training.evaluation.reconstruction import Reconstructions
from latentdiff.training.loop.distributed import spread_modules
from latentdiff.training.loop.estimate import module_bytes
from latentdiff.training.loop.output_folder import open_output
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.autoencoder import AutoencoderObjective, DiscriminatorObjective
from latentdiff.training.objectives.tiny import TinyObjective, load_teacher
from latentdiff.training.settings import AutoencoderSettings
from latentdiff.training.starting_networks import build_autoencoder
from latentdiff.training.trainers.latent_scale import measure_latents

logger = logging.getLogger(__name__)

MEMORY = 0.9  # weight of the past in an alarm's mean, per record
PATIENCE = 20  # records before an alarm, and between two of the same


def train_autoencoder(settings: AutoencoderSettings) -> Path:
    """Train an autoencoder, or go on with a run that `settings.output` holds; returns the model's folder.

    Raises:
        ValueError, FileNotFoundError: settings or pictures that cannot be trained on; the message says what to do.
    """
    open_output(settings, unsettled=settings.unsettled if settings.teacher else ())
    teacher, settings = load_teacher(settings)
    if settings.resolution % settings.factor:
        raise ValueError(f"resolution {settings.resolution} is not divisible by the factor {settings.factor}")
    given = {} if teacher is None else {"teacher": latents_digest(teacher)}
    open_output(settings, given)
    with processes().main_process_first():
        pictures, held_out = prepare_splits(settings, condition="none")
    set_seed(settings.seed)  # the first weights
    autoencoder = build_autoencoder(settings)
    if settings.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    discriminator = build_discriminator(settings)
    adversary = None if discriminator is None else DiscriminatorObjective(discriminator, settings)
    if teacher is None:
        objective = AutoencoderObjective(autoencoder, settings, discriminator)
    else:
        objective = TinyObjective(autoencoder, settings, discriminator, teacher)
    run = TrainingRun(settings, objective, adversary, settings.discriminator_learning_rate, given)
    if objective.learner is not None and spread_modules(run.objective):
        raise ValueError("FSDP cannot train a codebook; use several processes without FSDP, or kind=fsq")
    run.model_bytes = module_bytes(autoencoder)
    alarms = Alarms()
    reconstructions = Reconstructions(settings, held_out, pictures, objective.perceptual)
    views = ViewChoice(settings, pictures, settings.factor)
    order = PictureOrder(weights(pictures), run.update_size, settings.seed, views.buckets)
    for batch in batches(run, order, PixelSamples(settings, pictures, views), PixelBatch.cat):
        if figures := run.learn(batch.to(run.device)):
            alarms.add(figures)
        if run.is_to_look():
            with run.looking():
                run.stopping.at_leisure(lambda: reconstructions.report(run, objective.subject))
            alarms.add_validation(run.figures, adversary is not None and run.step > settings.discriminator_start)
    run.end_training()

    output = Path(settings.output)
    with run.averaged():
        autoencoder = run.whole(autoencoder)
        if run.accelerator.is_main_process:
            if teacher is None:  # whose latents are scaled already
                measure_latents(autoencoder, pictures, settings)
            autoencoder.save_pretrained(output)
        run.show_at_stop(lambda: reconstructions.report(run, objective.subject))
        reconstructions.write(run, output)
        describe(run, autoencoder_kind(settings.kind), len(pictures))
    run.finish()
    return output


def build_discriminator(settings: AutoencoderSettings) -> PatchDiscriminator | None:
    """A new discriminator, if the settings ask for one."""
    if settings.discriminator_weight == 0:
        return None
    return PatchDiscriminator(
        channels=settings.discriminator_channels,
        layers=settings.discriminator_layers,
        norm=settings.discriminator_norm,
    )


class Alarms:
    """Warns of what goes wrong in ways that the loss does not show.

    A codebook that collapses, a discriminator that wins, and pictures that get worse under it.

    `add` takes the figures of every record, `add_validation` those of every validation.

    Args:
        learner: what is trained, for messages.
    """

    def __init__(self, learner: str = "the autoencoder") -> None:
        self.learner = learner
        self._means: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._quiet: dict[str, int] = {}
        self._best: float | None = None

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            seen = self._seen[name] = self._seen.get(name, 0) + 1
            weight = max(1 - MEMORY, 1 / seen)
            self._means[name] = self._means.get(name, 0.0) + weight * (value - self._means.get(name, 0.0))
        self._quiet = {name: left - 1 for name, left in self._quiet.items() if left > 1}
        in_use = self._settled("codes_in_use", figures)
        if in_use is not None and in_use < 0.25:
            self._say(
                "codebook",
                f"the codebook is collapsing: {in_use:.1%} of the codes were used lately. codebook=ema with "
                f"codebook_start=kmeans and codebook_restart=100 keeps them in use; so does kind=fsq",
            )
        accuracy = self._settled("discriminator_accuracy", figures)
        if accuracy is not None and accuracy > 0.95:
            self._say(
                "discriminator",
                f"the discriminator is right about {accuracy:.1%} of the patches, so {self.learner} learns nothing "
                f"from it. Lower discriminator_learning_rate or discriminator_weight, set r1_weight=1, or begin later "
                f"with discriminator_start",
            )

    def add_validation(self, figures: Mapping[str, float], competing: bool) -> None:
        """figures: with ``psnr``. competing: whether the discriminator had begun."""
        psnr = figures.get("psnr")
        if psnr is None:
            return
        if not competing:
            self._best = psnr if self._best is None else max(self._best, psnr)
        elif self._best is not None and psnr < self._best - 2:
            self._say(
                "worse",
                f"since the discriminator began, PSNR fell from {self._best:.1f} to {psnr:.1f} dB. Lower "
                f"discriminator_weight, or adaptive_weight_limit",
            )

    def _settled(self, name: str, figures: Mapping[str, float]) -> float | None:
        return self._means[name] if name in figures and self._seen[name] >= PATIENCE else None

    def _say(self, name: str, message: str) -> None:
        if name not in self._quiet:
            self._quiet[name] = PATIENCE
            logger.warning("%s", message)
