"""What a network is given of captions: text states from a cache or a frozen encoder, tokens, classes, or nothing.

A source has a part for the workers of a data loader, which reads captions, and one for the training process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentdiff.text import encode_prompts, max_tokens
from latentdiff.training.batch.batches import Captions, Conditioning, ReadCaptions, Tokens
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


class CachedText(ConditionSource):
    """Text states from a cache."""

    def __init__(self, cache: TextCache, text_encoder: nn.Module) -> None:
        self.read, self.idle = TextReader(cache), (text_encoder,)

    def condition(self, captions: ReadCaptions, device: torch.device) -> Conditioning:
        assert isinstance(captions, Conditioning)
        assert captions.encoder_hidden_states is not None
        return Conditioning(captions.encoder_hidden_states.to(device).float())


@dataclass
class TextReader:
    """Reads a cache, in a worker."""

    cache: TextCache

    def __call__(self, caption: str) -> Conditioning:
        return Conditioning(self.cache[caption][None])  # (1, L, D) float16


class EncodedText(ConditionSource):
    """Captions through a frozen text encoder, batch by batch."""

    def __init__(self, tokenizer: Any, text_encoder: Any, device: torch.device) -> None:
        self.read, self.tokenizer, self.text_encoder = read_text, tokenizer, text_encoder.to(device)

    @torch.no_grad()
    def condition(self, captions: ReadCaptions, device: torch.device) -> Conditioning:
        assert isinstance(captions, Captions)
        states = encode_prompts(captions.texts, self.tokenizer, self.text_encoder, warn=False)  # (B, L, D)
        return Conditioning(states.float().to(device))


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


class ClassSource(ConditionSource):
    """Captions as classes; the empty one is no class and has the number after the last."""

    def __init__(self, names: Sequence[str]) -> None:
        self.read = ClassReader({name: number for number, name in enumerate(names)})


@dataclass
class ClassReader:
    """Class names to numbers, (1,) long. Raises ValueError for a class that is not known."""

    numbers: Mapping[str, int]

    def __call__(self, caption: str) -> Conditioning:
        if caption and caption not in self.numbers:
            raise ValueError(f"there is a held-out picture of {caption!r}, of which no training picture is; remove it")
        return Conditioning(class_labels=torch.tensor([self.numbers.get(caption, len(self.numbers))]))


class NoCondition(ConditionSource):
    """Nothing, for unconditional networks."""

    def __init__(self) -> None:
        self.read = read_nothing


def read_nothing(caption: str) -> Conditioning:
    """A condition without fields."""
    return Conditioning()


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
