"""What a network is given of captions: text states from a cache or a frozen encoder, tokens, classes, or nothing.

A source has a part for the workers of a data loader, which reads captions, and one for the training process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentdiff.conditioning import ClassConditioner, Conditioner, Conditioning, NoConditioner
from latentdiff.text import max_tokens
from latentdiff.text.conditioner import TextConditioner
from latentdiff.training.batch.batch_types import Captions, ReadCaptions, Tokens
from latentdiff.training.batch.choices import CaptionChoice
from latentdiff.training.batch.latents import cache_folder
from latentdiff.training.cache import TextCache
from latentdiff.training.cache.text import warn_of_long
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings


class ConditionSource:
    """What a network is given of captions.

    Attributes:
        read: for workers; a caption, as a batch of one.
        idle: networks that training does not need, as a cache takes their place.
    """

    read: Callable[[str], ReadCaptions]
    idle: tuple[nn.Module, ...] = ()

    def condition(self, captions: ReadCaptions, device: torch.device) -> Conditioning | Tokens:
        """What the network is given, on `device`."""
        assert not isinstance(captions, Captions)
        return captions.to(device)


class ReadConditions(ConditionSource):
    """What a conditioner that needs no network makes of captions: classes, or nothing."""

    def __init__(self, conditioner: Conditioner) -> None:
        self.read = OneCaption(conditioner)


@dataclass
class OneCaption:
    """A conditioner for one caption."""

    conditioner: Conditioner

    def __call__(self, caption: str) -> Conditioning:
        return self.conditioner([caption])


class CachedText(ConditionSource):
    """Text states from a cache."""

    def __init__(self, cache: TextCache, text_encoder: nn.Module) -> None:
        self.read, self.idle = TextReader(cache), (text_encoder,)

    def condition(self, captions: ReadCaptions, device: torch.device) -> Conditioning:
        assert isinstance(captions, Conditioning)
        return captions.to(device).to(dtype=torch.float32)


@dataclass
class TextReader:
    """Reads a cache, in a worker."""

    cache: TextCache

    def __call__(self, caption: str) -> Conditioning:
        return Conditioning(states=self.cache[caption][None])  # (1, L, D) float16


class EncodedText(ConditionSource):
    """Captions through a frozen text encoder, batch by batch."""

    def __init__(self, tokenizer: Any, text_encoder: Any, device: torch.device) -> None:
        self.read = read_text
        self.conditioner = TextConditioner(tokenizer, text_encoder.to(device), warn=False)

    @torch.no_grad()
    def condition(self, captions: ReadCaptions, device: torch.device) -> Conditioning:
        assert isinstance(captions, Captions)
        return self.conditioner(captions.texts).to(device, torch.float32)


def read_text(caption: str) -> Captions:
    """The caption itself."""
    return Captions((caption,))


class TokenSource(ConditionSource):
    """Tokens, for a text encoder that is trained.

    Args:
        text_encoder: says how many tokens it takes, and whether it uses an attention mask.
        prepare: what is done to a caption before.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, prepare: Callable[[str], str]) -> None:
        mask = bool(getattr(text_encoder.config, "use_attention_mask", False))
        self.read = TokenReader(tokenizer, max_tokens(tokenizer, text_encoder), mask, prepare)


@dataclass
class TokenReader:
    """See `TokenSource`."""

    tokenizer: Any
    length: int
    mask: bool
    prepare: Callable[[str], str]

    def __call__(self, caption: str) -> Tokens:
        encoded = self.tokenizer(
            [self.prepare(caption)], padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return Tokens(encoded.input_ids, encoded.attention_mask if self.mask else None)


def class_source(classes: Sequence[str], pictures: Sequence[CaptionedPicture]) -> ConditionSource:
    """Numbers of classes, in the order of their names.

    Raises:
        ValueError: a picture, which must be held out, is of none of them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for picture in pictures:
        if picture.captions[0] not in numbers:
            raise ValueError(
                f"{picture.name}: a held-out picture of {picture.captions[0]!r}, of which no training picture is; "
                f"remove it"
            )
    return ReadConditions(ClassConditioner(numbers))


def no_source() -> ConditionSource:
    """Nothing, for unconditional networks."""
    return ReadConditions(NoConditioner())


def text_source(
    run: TrainingRun,
    settings: DiffusionSettings,
    tokenizer: Any,
    text_encoder: Any,
    pictures: Sequence[CaptionedPicture],
) -> ConditionSource:
    """The source for a frozen text encoder that the settings ask for; a cache is filled with all captions.

    Warns once of captions that are too long. The encoder is back on the CPU afterwards where it is not needed, so that
    a GPU's memory is the denoiser's.
    """
    choice = CaptionChoice(settings)
    if not settings.cache_text:
        if run.accelerator.is_main_process:
            own = {caption for picture in pictures for caption in picture.captions}
            warn_of_long(sorted(own), tokenizer, max_tokens(tokenizer, text_encoder))
        return EncodedText(tokenizer, text_encoder, run.device)
    text_encoder.to(run.device)
    cache = TextCache(cache_folder(run, settings) / "text", tokenizer, text_encoder)
    captions = {caption for picture in pictures for caption in choice.all(picture.captions)}
    captions |= {picture.captions[0] for picture in pictures} | {""}
    cache.fill(sorted(captions), tokenizer, text_encoder, run.accelerator)
    return CachedText(cache, text_encoder.to("cpu"))
