"""Filling the cache of latents and text states before a training, as jobs of its own."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latentdiff.codec import Codec
from latentdiff.pipelines import DiTPipeline, PixArtTextToImagePipeline
from latentdiff.pipelines.distributed import processes
from latentdiff.text import load_text_encoder
from latentdiff.text.encode import TextConditioner
from latentdiff.training.batch.conditions import TextCache, fill_captions
from latentdiff.training.batch.latents import LatentCache, PictureView, cache_labels
from latentdiff.training.batch.random_choices import ViewChoice
from latentdiff.training.batch.two_encoders import JointTextCache, caption_conditioner
from latentdiff.training.data import CaptionedPicture, NoPicturesError
from latentdiff.training.data.load import prepare_pictures
from latentdiff.training.loop.distributed import accelerator_of
from latentdiff.training.settings import Condition, DenoiserSettings, DiffusionSettings, FinetuneSettings
from latentdiff.training.starting_networks import Conditions, build_denoiser, load_autoencoder, text_manner
from latentdiff.training.trainers.denoiser import build_process
from latentdiff.training.trainers.finetune import FAMILIES, complete, load_model

logger = logging.getLogger(__name__)

Part = tuple[int, int]


def encode(settings: FinetuneSettings | DenoiserSettings, part: Part = (1, 1)) -> Path:
    """Encode the k-th of n parts of the pictures and captions into ``settings.output``; goes on where it stopped.

    The folder is what trainings with the same settings take as ``cache_dir``. Several jobs may write to one folder at
    once, and the files of several folders may be laid together, for each has a name of its own.

    Args:
        part: (k, n), from 1.

    Returns:
        ``settings.output``.

    Raises:
        ValueError, FileNotFoundError: see the trainings.
        OSError: the disk is full.
    """
    output = Path(settings.output)
    settings = settings.model_copy(update={"cache_dir": settings.output})
    condition: Condition = "text"
    text: tuple[Any, Any] | None
    pipeline: Any = None
    if isinstance(settings, FinetuneSettings):
        pipeline = load_model(settings.model, FAMILIES)
        settings = complete(settings, pipeline)
        codec, condition = Codec(pipeline.vae), "class" if isinstance(pipeline, DiTPipeline) else "text"
        text = (pipeline.tokenizer, pipeline.text_encoder) if condition == "text" else None
        step = codec.factor * (pipeline.unet.downscale_factor if settings.buckets else 1)
        if settings.train_text_encoder or settings.method == "textual-inversion":
            text = None
    else:
        condition = settings.condition
        codec = Codec(load_autoencoder(settings.autoencoder))
        text = load_text_encoder(settings.text_encoder) if condition == "text" else None
        step = codec.factor * (_downscale_factor(settings, codec, text) if settings.buckets else 1)
    accelerator = accelerator_of(settings)
    found = []
    for split in (None, "validation"):
        try:
            with processes().main_process_first():
                found.append((split, prepare_pictures(settings, split, condition, None if part == (1, 1) else part)))
        except NoPicturesError:
            if split is None:
                raise
    for split, pictures in found:
        if settings.cache_latents:
            _encode_pictures(settings, codec, pictures, step, split is not None, output, accelerator)
        if text is not None and settings.cache_text:
            joint = None if pipeline is None or not pipeline.for_sdxl else pipeline
            masked = isinstance(pipeline, PixArtTextToImagePipeline)
            manner = text_manner("dit" if masked else getattr(settings, "denoiser", ""))
            _encode_captions(settings, text, pictures, output, accelerator, manner, joint)
    return output


def _downscale_factor(settings: DenoiserSettings, codec: Codec, text: tuple[Any, Any] | None) -> int:
    width = text[1].config.hidden_size if text else 0
    conditions = Conditions(text_width=width, classes=2 * (settings.condition == "class"))
    return int(build_denoiser(settings, codec, build_process(settings, codec), conditions).downscale_factor)


def _encode_pictures(
    settings: DiffusionSettings,
    codec: Codec,
    pictures: Sequence[CaptionedPicture],
    step: int,
    is_held_out: bool,
    output: Path,
    accelerator: Accelerator,
) -> None:
    """All views that a training may take; a part does not know which of its pictures will be held out."""
    views = ViewChoice(settings, pictures, step, settings.cached_variants)

    def wanted() -> Iterator[PictureView]:
        for i, picture in enumerate(pictures):
            own = [] if is_held_out else views.all(i)
            may_be = is_held_out or int(picture.digest[:8], 16) < settings.held_out_share * 2**32
            own += [views.centred(i)] if may_be and views.centred(i) not in own else []
            yield from ((picture, view) for view in own)

    codec.autoencoder.to(accelerator.device)
    cache = LatentCache(output / "latents", codec.autoencoder, cache_labels(settings, "autoencoder", "model"))
    cache.fill(wanted(), codec.autoencoder, accelerator, min(8, settings.batch_size), settings.num_workers)


def _encode_captions(
    settings: DiffusionSettings,
    text: tuple[Any, Any],
    pictures: Sequence[CaptionedPicture],
    output: Path,
    accelerator: Accelerator,
    manner: type[TextConditioner],
    joint: Any = None,
) -> None:
    """joint: SDXL's pipeline, with both of its text encoders."""
    tokenizer, text_encoder = text
    labels = cache_labels(settings, "text_encoder", "model")
    cache: TextCache
    fill: Callable[[list[str]], None]
    if joint is not None:
        joint.text_encoder_2.to(accelerator.device)
        text_encoder.to(accelerator.device)
        conditioner = caption_conditioner(joint, accelerator.device)
        cache = both = JointTextCache(output / "text", conditioner, labels)
        fill = partial(both.fill_with, conditioner=conditioner, accelerator=accelerator)
    else:
        cache = TextCache(output / "text", tokenizer, text_encoder.to(accelerator.device), labels, manner)
        fill = partial(cache.fill, tokenizer=tokenizer, text_encoder=text_encoder, accelerator=accelerator)
    fill_captions(cache.store, fill, settings, pictures, accelerator)
