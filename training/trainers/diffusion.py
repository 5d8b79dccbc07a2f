"""The training of denoisers, new ones or not, and of classifiers of noisy pictures."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from latentdiff.codec import Codec
from latentdiff.interchange.png import save_picture
from latentdiff.pipelines.distributed import processes
from latentdiff.training.batch.batch_loader import Reader, batches
from latentdiff.training.batch.batch_types import DiffusionBatch, SampleBatch
from latentdiff.training.batch.latents import NoLatents, PictureView, latent_source
from latentdiff.training.batch.masks import mask_reader
from latentdiff.training.batch.random_choices import PictureOrder, ViewChoice, views_digest
from latentdiff.training.card.card import describe
from latentdiff.training.card.kinds import ModelKind
from latentdiff.training.data import CaptionedPicture, prepare_splits
from latentdiff.training.data.caption_checks import SIDES, shorten
from latentdiff.training.data.masks import has_masks
from latentdiff.training.data.picture_table import Joined, PictureTable, of_sides, weights
from latentdiff.training.evaluation.held_out import HeldOutLoss
from latentdiff.training.evaluation.suitability import examine_autoencoder
from latentdiff.training.loop.distributed import spread_modules
from latentdiff.training.loop.estimate import FEW, duration, module_bytes
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.objective import Objective, RealAndFake
from latentdiff.training.settings import Condition, DenoiserSettings, DiffusionSettings, MaskSettings, PriorSettings
from latentdiff.training.trainers.diffusion_models import DiffusionModel
from latentdiff.training.trainers.latent_scale import spread
from latentdiff.training.trainers.samples import Samples

logger = logging.getLogger(__name__)

SHOWN = 10_000  # of very many pictures, that captions of samples are chosen from
BANDS = 4  # of timesteps, for which the held-out loss is given separately


@dataclass
class Data:
    """Pictures to train on, and others to measure on. are_masked: whether the loss looks at their masks."""

    pictures: Sequence[CaptionedPicture]
    held_out: Sequence[CaptionedPicture]
    are_masked: bool = False


def load_data(settings: DiffusionSettings, condition: Condition = "text") -> Data:
    """The usable pictures of both splits; one process examines them first, the others read what it found."""
    with processes().main_process_first():
        data = Data(*prepare_splits(settings, condition))
    if isinstance(settings, MaskSettings):
        data.are_masked = has_masks(Joined(data.pictures, data.held_out), settings.masked_loss)
    if not data.held_out:
        logger.warning("nothing is measured on held-out pictures, for there are none; give some the split 'validation'")
    say_mirrored(settings, data.pictures)
    return data


def save_new(model: DiffusionModel, settings: DenoiserSettings | PriorSettings, in_steps: bool = True) -> None:
    """Write the pipeline of a new model, which draws as its samples were drawn. in_steps: by a number of steps."""
    pipeline = model.pipeline()
    defaults: dict[str, float] = {"num_inference_steps": settings.sample_steps} if in_steps else {}
    if settings.condition != "none":
        defaults["guidance_scale"] = settings.sample_guidance_scale
    pipeline.register_defaults(**defaults)
    pipeline.save_pretrained(settings.output)


def say_mirrored(settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]) -> None:
    """Say which pictures are not mirrored, or should not be, because of their captions."""
    found = of_sides(pictures) if settings.random_flip else []
    if not len(found):
        return
    example = f"the captions of {len(found)} of {len(pictures)} pictures speak of left, right or text, such as "
    example += repr(shorten(next(filter(SIDES.search, pictures[int(found[0])].captions))))
    if settings.random_flip == "auto":
        logger.info("%s; these are never mirrored (random_flip=true would mirror all, =false none)", example)
    else:
        logger.warning("%s, and random_flip=true mirrors them; random_flip=auto leaves these alone", example)


def train_diffusion(
    settings: DiffusionSettings,
    model: DiffusionModel,
    data: Data,
    objective: Objective[DiffusionBatch],
    save: Callable[[], None],
    kind: ModelKind,
    base_model: str | None = None,
    adversary: Objective[RealAndFake] | None = None,
    adversary_rate: float | None = None,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Train the parameters of `objective` that require a gradient, or go on with the run in ``settings.output``.

    Args:
        model: its networks that are trained are the very ones in `objective`, the others are frozen.
        save: called once at the end, on the main process, with the averaged weights in place.
        kind, base_model: for the card; a base model draws the samples before training too.
        adversary, adversary_rate: see `TrainingRun`.
        watch: gets the objectives' figures whenever they are recorded.

    Returns:
        ``settings.output``.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be trained on, and what to do.
        FloatingPointError: the loss went bad; see `Learner.learn`.
        DryRunEnd: see `TrainingRun.passes`.
    """
    run = TrainingRun(settings, objective, adversary, adversary_rate, given=model.given())
    if spread_modules(run.objective) and not is_trained_whole(objective, model.network):
        raise ValueError(
            "under FSDP only a whole UNet can be trained: no LoRA, no text encoder, and no distillation; use DDP"
        )
    looks = objective.takes_latents
    if looks and run.step == 0 and run.accelerator.is_main_process and not model.codec.is_identity:
        show_suitability(run, settings, model.codec, data.pictures)
    run.model_bytes = module_bytes(*model.pipeline().components.values())
    few = some_of(run, settings, model, data, looks) if settings.is_dry_run else data
    reader, views, other_views = reader_of(run, settings, model, few, looks)
    bands = min(BANDS, model.process.num_timesteps)
    held_out = reader.held_out(few.held_out, other_views, bands)
    loss = HeldOutLoss(model.process, bands)
    shown = spread(data.pictures, SHOWN) if isinstance(data.pictures, PictureTable) else data.pictures
    samples = Samples(run, settings, model, shown, reader.idle)
    run.draws_before = base_model is not None
    if run.draws_before and run.step == 0 and not settings.is_dry_run and run.takes_part:
        run.show_besides(samples.draw_before)
    order = PictureOrder(weights(few.pictures), run.update_size, settings.seed, views.buckets)
    for batch in batches(run, order, reader.samples(few.pictures, views), SampleBatch.cat, objective.batch_of):
        figures = run.learn(reader.batch(batch))
        if figures and watch is not None:
            watch(figures)
        if run.is_to_look():
            look(run, lambda: loss(run.objective, held_out, run.accelerator), samples)
    run.end_training()
    with run.averaged():
        if run.has_stopped_unseen:
            run.measured(loss(run.objective, held_out, run.accelerator))
        model.network = run.whole(model.network)
        if run.accelerator.is_main_process:
            save()
            run.show_at_stop(samples.draw)
            describe(run, kind, len(data.pictures), base_model)
    run.finish()
    return Path(settings.output)


def look(run: TrainingRun, measure: Callable[[], dict[str, float]], samples: Samples) -> None:
    """Measure on held-out pictures, and draw samples."""
    with run.looking():
        figures = measure()
        if run.takes_part:
            run.stopping.at_leisure(samples.draw)
    run.measured(figures)
    run.accelerator.wait_for_everyone()


def some_of(run: TrainingRun, settings: DiffusionSettings, model: DiffusionModel, data: Data, looks: bool) -> Data:
    """A few pictures for a dry run, already encoded; says how long all of them would take."""
    few = Data(spread(data.pictures, FEW), spread(data.held_out, FEW), data.are_masked)
    began = time.monotonic()
    reader_of(run, settings, model, few, looks)
    each = (time.monotonic() - began) / (len(few.pictures) + len(few.held_out))
    seconds = duration(each * (len(data.pictures) + len(data.held_out)))
    logger.info("encoding all pictures, once and before the first step, takes about %s", seconds)
    return few


def reader_of(
    run: TrainingRun, settings: DiffusionSettings, model: DiffusionModel, data: Data, looks: bool
) -> tuple[Reader, ViewChoice, ViewChoice]:
    """What reads the pictures, once the caches are filled with them, and the views of both splits.

    looks: at the pictures; else captions alone are read.
    """
    factor = model.codec.factor
    step = factor * model.network.downscale_factor if settings.buckets else factor
    views = ViewChoice(settings, data.pictures, step, settings.cached_variants if settings.cache_latents else 0)
    other_views = ViewChoice(settings, data.held_out, step)

    def wanted() -> Iterator[PictureView]:
        yield from ((picture, view) for i, picture in enumerate(data.pictures) for view in views.all(i))
        yield from ((picture, other_views.centred(i)) for i, picture in enumerate(data.held_out))

    what = views_digest(settings, Joined(data.pictures, data.held_out), step)
    reader = Reader(
        settings,
        model.codec,
        latent_source(run, settings, model.codec, wanted, what) if looks else NoLatents(model.codec, run.device),
        model.conditions(run, settings, Joined(data.pictures, data.held_out)),
        run.update_size,
        run.device,
        mask_reader(run, settings, factor, wanted) if data.are_masked else None,
    )
    return reader, views, other_views


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
    where = "" if settings.is_dry_run else f" Originals and reconstructions: {file}"
    logger.info("%s%s", found.figures(name), where)
    if not found.suits:
        logger.warning("%s", found.advice(name, own=hasattr(settings, "autoencoder")))


def is_trained_whole(objective: nn.Module, network: nn.Module) -> bool:
    """Whether all of the network is trained, and there is nothing else."""
    own = {id(parameter) for parameter in network.parameters()}
    return own == {id(parameter) for parameter in objective.parameters()} and all(
        parameter.requires_grad for parameter in network.parameters()
    )
