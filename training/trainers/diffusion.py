"""The training of denoisers, new ones or not, and of classifiers of noisy pictures."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from latentdiff.codec import Codec
from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.folders import read_json
from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.pipelines.distributed import processes
from latentdiff.training.batch.batch_loader import Reader, batches
from latentdiff.training.batch.batch_types import DiffusionBatch, SampleBatch
from latentdiff.training.batch.latents import latent_source
from latentdiff.training.batch.random_choices import PictureOrder, ViewChoice
from latentdiff.training.data import CaptionedPicture, prepare_splits
from latentdiff.training.evaluation.held_out import HeldOutLoss
from latentdiff.training.evaluation.suitability import examine_autoencoder
from latentdiff.training.loop.distributed import spread_modules
from latentdiff.training.loop.figures import labelled
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.objective import Objective, RealAndFake
from latentdiff.training.settings import Condition, DiffusionSettings
from latentdiff.training.trainers.diffusion_models import SAMPLES, DiffusionModel, UnconditionalModel

logger = logging.getLogger(__name__)

BANDS = 4  # of timesteps, for which the held-out loss is given separately


@dataclass
class Data:
    """Pictures to train on, and others to measure on."""

    pictures: list[CaptionedPicture]
    held_out: list[CaptionedPicture]


def load_data(settings: DiffusionSettings, condition: Condition = "text") -> Data:
    """The usable pictures of both splits; one process examines them first, the others read what it found."""
    with processes().main_process_first():
        data = Data(*prepare_splits(settings, condition))
    if not data.held_out:
        logger.warning("nothing is measured on held-out pictures, for there are none; give some the split 'validation'")
    return data


def train_diffusion(
    settings: DiffusionSettings,
    model: DiffusionModel,
    data: Data,
    objective: Objective[DiffusionBatch],
    save: Callable[[TrainingRun], None],
    adversary: Objective[RealAndFake] | None = None,
    adversary_rate: float | None = None,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Train the parameters of `objective` that require a gradient, or go on with the run in ``settings.output``.

    Args:
        model: its networks that are trained are the very ones in `objective`, the others are frozen.
        save: called once at the end, on the main process, with the averaged weights in place.
        adversary, adversary_rate: see `TrainingRun`.
        watch: gets the objectives' figures whenever they are recorded.

    Returns:
        ``settings.output``.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be trained on, and what to do.
        FloatingPointError: the loss went bad; see `Learner.learn`.
    """
    factor = model.codec.factor
    step = factor * model.network.downscale_factor if settings.buckets else factor
    run = TrainingRun(settings, objective, adversary, adversary_rate, given=model.given())
    if spread_modules(run.objective) and not is_trained_whole(objective, model.network):
        raise ValueError(
            "under FSDP only a whole UNet can be trained: no LoRA, no text encoder, and no distillation; use DDP"
        )
    if run.step == 0 and run.accelerator.is_main_process and not model.codec.is_identity:
        show_suitability(run, settings, model.codec, data.pictures)
    views = ViewChoice(settings, data.pictures, step, settings.cached_variants if settings.cache_latents else 0)
    other_views = ViewChoice(settings, data.held_out, step)
    wanted = [(picture, view) for i, picture in enumerate(data.pictures) for view in views.all(i)]
    wanted += [(picture, other_views.centred(i)) for i, picture in enumerate(data.held_out)]
    reader = Reader(
        settings,
        model.codec,
        latent_source(run, settings, model.codec, wanted),
        model.conditions(run, settings, data.pictures + data.held_out),
        run.update_size,
        run.device,
    )
    bands = min(BANDS, model.process.num_timesteps)
    held_out = reader.held_out(data.held_out, other_views, bands)
    loss = HeldOutLoss(model.process, bands)
    prompts = settings.sample_prompts or chosen_captions(run, data.pictures)
    order = PictureOrder([p.weight for p in data.pictures], run.update_size, settings.seed, views.buckets)
    for samples in batches(run, order, reader.samples(data.pictures, views), SampleBatch.cat):
        figures = run.learn(reader.batch(samples))
        if figures and watch is not None:
            watch(figures)
        if run.due(settings.sample_every):
            with run.averaged():
                figures = loss(run.objective, held_out, run.accelerator)
                if run.takes_part:
                    run.stopping.at_leisure(lambda: draw_samples(run, settings, model, prompts, reader.idle))
            run.measured(figures)
            run.accelerator.wait_for_everyone()
    run.end_training()
    with run.averaged():
        model.network = run.whole(model.network)
        if run.accelerator.is_main_process:
            save(run)
    run.finish()
    return Path(settings.output)


def show_suitability(
    run: TrainingRun, settings: DiffusionSettings, codec: Codec, pictures: Sequence[CaptionedPicture]
) -> None:
    """Say how well the autoencoder holds some of the user's own pictures; a sheet of them is kept in the run."""
    drawn = (getattr(settings, "class_prompt", None),)  # DreamBooth's pictures of the class are the model's own
    own = [picture for picture in pictures if picture.captions != drawn]
    codec.autoencoder.to(run.device)
    found = examine_autoencoder(codec, own or pictures, settings.resolution)
    file, name = run.folder / "reconstructions.png", getattr(settings, "autoencoder", getattr(settings, "model", ""))
    save_picture(found.sheet, file)
    logger.info("%s Originals and reconstructions: %s", found.figures(name), file)
    if not found.suits:
        logger.warning("%s", found.advice(name))


def is_trained_whole(objective: nn.Module, network: nn.Module) -> bool:
    """Whether all of the network is trained, and there is nothing else."""
    own = {id(parameter) for parameter in network.parameters()}
    return own == {id(parameter) for parameter in objective.parameters()} and all(
        parameter.requires_grad for parameter in network.parameters()
    )


def chosen_captions(run: TrainingRun, pictures: Sequence[CaptionedPicture]) -> list[str]:
    """`sample_captions`, chosen once: a run that goes on draws the same, whatever pictures have come and gone."""
    file = run.folder / "sample_captions.json"
    with run.accelerator.main_process_first():
        if run.step > 0 and file.is_file():
            return [str(caption) for caption in read_json(file).get("captions", [])]
        captions = sample_captions(pictures)
        if run.accelerator.is_main_process:
            write_text_whole(file, json.dumps({"captions": captions}, indent=1, ensure_ascii=False) + "\n")
    return captions


def sample_captions(pictures: Sequence[CaptionedPicture], most: int = SAMPLES) -> list[str]:
    """Captions to draw samples of: different ones as long as there are any, spread over the pictures."""
    rounds: dict[str, int] = {}
    by_round: list[list[str]] = []
    for picture in pictures:
        caption = picture.captions[0]
        number = rounds[caption] = rounds.get(caption, -1) + 1
        if number == len(by_round):
            by_round.append([])
        by_round[number].append(caption)
    chosen: list[str] = []
    for captions in by_round:
        room = min(most - len(chosen), len(captions))
        chosen += [captions[i * len(captions) // room] for i in range(room)]
    return chosen


def draw_samples(
    run: TrainingRun,
    settings: DiffusionSettings,
    model: DiffusionModel,
    prompts: Sequence[str],
    idle: Sequence[Any],
) -> None:
    """A grid with the prompts below, drawn by the pipeline that will be saved; `idle` networks leave a GPU then."""
    images = model.draw(prompts, settings, run.device)
    for network in idle:  # a GPU's memory is the denoiser's
        network.to("cpu")
    if not run.accelerator.is_main_process:
        return
    if not isinstance(model, UnconditionalModel):
        images = [labelled(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    run.show("samples", image_grid(images, 8))
