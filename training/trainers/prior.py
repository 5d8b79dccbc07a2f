"""Training a prior: a transformer over the codes of an autoencoder, conditioned on text, a class or nothing."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from latentdiff.codec import TokenCodec
from latentdiff.diffusion.tokens import ORDERS
from latentdiff.interchange.fingerprint import codes_digest
from latentdiff.models import TokenTransformer
from latentdiff.pipelines import ClassTokenPipeline, TokenPipeline, UnconditionalTokenPipeline
from latentdiff.pipelines.storage.places import text_encoder_at
from latentdiff.training.card.kinds import codes_kind, is_plain, short_captions
from latentdiff.training.data.caption_checks import class_names
from latentdiff.training.loop.output_folder import open_output
from latentdiff.training.objectives.tokens import TokenObjective
from latentdiff.training.settings import DiffusionSettings, PriorSettings
from latentdiff.training.starting_networks import Conditions, freeze, load_autoencoder
from latentdiff.training.trainers.diffusion import load_data, save_new, train_diffusion
from latentdiff.training.trainers.diffusion_models import ClassModel, DiffusionModel, TextModel, UnconditionalModel


class CodesModel(DiffusionModel):
    """What models of codes share: in raster order the number of steps is the model's own."""

    def steps(self, settings: DiffusionSettings) -> int | None:
        return None if self.network.causal else settings.sample_steps


@dataclass
class TokenTextModel(CodesModel, TextModel):
    """A prior that is conditioned on text."""

    def pipeline(self) -> Any:
        return TokenPipeline(self.codec.autoencoder, self.text_encoder, self.tokenizer, self.network)


@dataclass
class TokenClassModel(CodesModel, ClassModel):
    """A prior that is conditioned on classes."""

    def pipeline(self) -> Any:
        return ClassTokenPipeline(self.network, self.codec.autoencoder, dict(enumerate(self.classes)))


@dataclass
class TokenUnconditionalModel(CodesModel, UnconditionalModel):
    """A prior that is given nothing but codes."""

    def pipeline(self) -> Any:
        return UnconditionalTokenPipeline(self.network, self.codec.autoencoder)


def train_prior(settings: PriorSettings) -> Path:
    """Train a prior, or go on with a run that `settings.output` holds; returns the pipeline's folder.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or models that cannot be trained on, and what to do.
    """
    open_output(settings)
    codec = codec_of(settings)
    text: Any = text_encoder_at(settings.text_encoder) if settings.condition == "text" else None
    data = load_data(settings, settings.condition)
    classes = class_names(data.pictures) if settings.condition == "class" else []
    freeze(codec.autoencoder)
    width = None
    if text is not None:
        freeze(text[1])
        width = text[1].config.hidden_size
    set_seed(settings.seed)
    network = build_prior(settings, codec, Conditions(width, len(classes)))
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    order = ORDERS[settings.order]()
    parts = (codec, network, None, order)
    model: DiffusionModel
    if text is not None:
        model = TokenTextModel(*parts, *text)
    else:
        model = TokenClassModel(*parts, classes=classes) if classes else TokenUnconditionalModel(*parts)

    objective = TokenObjective(network, order, settings.label_smoothing, values=3 * codec.factor**2)
    shown = (
        [*filter(is_plain, settings.sample_prompts), *short_captions(data.pictures)] if text is not None else classes
    )
    kind = codes_kind(settings.condition, next(iter(shown), None))
    save = partial(save_new, model, settings, in_steps=not network.causal)
    return train_diffusion(settings, model, data, objective, save, kind)


def codec_of(settings: PriorSettings) -> TokenCodec:
    """The autoencoder as a source of codes.

    Raises:
        ValueError: it has none, or cannot divide the resolution.
    """
    try:
        codec = TokenCodec(load_autoencoder(settings.autoencoder))
    except ValueError as error:
        raise ValueError(f"{settings.autoencoder}: {str(error).removeprefix(f'{settings.autoencoder}: ')}") from error
    if settings.resolution % codec.factor:
        raise ValueError(
            f"resolution {settings.resolution} is not divisible by the autoencoder's factor {codec.factor}"
        )
    return codec


def build_prior(settings: PriorSettings, codec: TokenCodec, conditions: Conditions) -> TokenTransformer:
    """A new transformer for the codec's codes; with classes it knows one more, for none of them."""
    return TokenTransformer(
        num_vq_embeddings=codec.codes,
        sample_size=settings.resolution // codec.factor,
        order=settings.order,
        num_layers=settings.num_layers,
        num_attention_heads=settings.num_attention_heads,
        attention_head_dim=settings.attention_head_dim,
        positions=settings.positions,
        cross_attention_dim=conditions.text_width,
        num_classes=conditions.classes or None,
        autoencoder_digest=codes_digest(codec.autoencoder),
    )
