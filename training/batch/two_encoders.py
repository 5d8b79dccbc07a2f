"""What SDXL is given of captions: the states of two text encoders side by side, and the second's pooled embedding."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.text import max_tokens
from latentdiff.text.two_encoders import JointTextConditioner, zeroed
from latentdiff.text.words import expand_words
from latentdiff.training.batch.batch_types import Captions, Tokens
from latentdiff.training.batch.cache import TensorStore, digest, evaluating
from latentdiff.training.batch.conditions import (
    ConditionSource,
    TextCache,
    fill_captions,
    look_for_long,
    read_tokens,
    text_digest,
    warn_of_long,
)
from latentdiff.training.batch.latents import cache_folder, cache_labels
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DiffusionSettings


@dataclass(frozen=True)
class CaptionConditioner(JointTextConditioner):
    """Of captions; where the model draws without a prompt by zeros, the empty caption is zeros too."""

    def __call__(
        self, prompts: Sequence[str], chunks: int | None = None, second: Sequence[str] | None = None
    ) -> Conditioning:
        found = super().__call__(prompts, chunks, second)
        if not self.zeros_for_none:
            return found
        return zeroed(found, are_empty(prompts))


def are_empty(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([not prompt for prompt in prompts])


class JointTextCache(TextCache):
    """States (L, D1 + D2) and pooled embedding (D',) by caption, as one row of float16 each.

    Args:
        conditioner: is not kept.
        labels: see `TensorStore`.
    """

    def __init__(self, folder: Path, conditioner: CaptionConditioner, labels: Mapping[str, str] | None = None) -> None:
        parts = conditioner.parts
        self.length = parts[-1].length
        self.width = sum(int(part.text_encoder.config.hidden_size) for part in parts)
        digests = [text_digest(part.tokenizer, part.text_encoder) for part in parts]
        self.store = TensorStore(Path(folder) / digest("two encoders", conditioner.zeros_for_none, *digests), labels)

    def fill_with(
        self, captions: Iterable[str], conditioner: CaptionConditioner, accelerator: Accelerator, batch_size: int = 32
    ) -> None:
        """See `TextCache.fill`."""

        def encode(texts: list[str]) -> Tensor:
            found = conditioner(texts)
            assert found.states is not None
            assert found.pooled is not None
            return torch.cat([found.states.flatten(1), found.pooled], dim=1)

        captions, first = list(captions), conditioner.parts[0]
        if accelerator.is_main_process:
            warn_of_long(captions, first.tokenizer, max_tokens(first.tokenizer, first.text_encoder))
        with ExitStack() as stack:
            for part in conditioner.parts:
                stack.enter_context(evaluating(part.text_encoder))
            self.encode(captions, encode, accelerator, batch_size)

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """States (B, L, D1 + D2) and pooled embeddings (B, D'), float16."""
        rows = torch.stack([self[caption] for caption in captions])
        states, pooled = rows.tensor_split([self.length * self.width], dim=1)
        return Conditioning(states=states.unflatten(1, (self.length, self.width)), pooled=pooled)


def joint_source(
    run: TrainingRun,
    settings: DiffusionSettings,
    conditioner: CaptionConditioner,
    pictures: Sequence[CaptionedPicture],
) -> ConditionSource:
    """`conditions.text_source` for two frozen text encoders; pictures' sizes are told too."""
    encoders = tuple(part.text_encoder.to(run.device) for part in conditioner.parts)
    if not settings.cache_text:
        first = conditioner.parts[0]
        look_for_long(run, pictures, first.tokenizer, first.text_encoder)
        return ConditionSource(Captions, conditioner, tells_sizes=True)
    cache = JointTextCache(
        cache_folder(run, settings) / "text", conditioner, cache_labels(settings, "text_encoder", "model")
    )
    fill = partial(cache.fill_with, conditioner=conditioner, accelerator=run.accelerator)
    fill_captions(cache.store, fill, settings, pictures, run.accelerator)
    return ConditionSource(
        partial(read_joint, cache), idle=tuple(encoder.to("cpu") for encoder in encoders), tells_sizes=True
    )


def joint_token_source(conditioner: CaptionConditioner) -> ConditionSource:
    """`conditions.token_source` for two text encoders that are trained."""
    tokenizers = [part.tokenizer for part in conditioner.parts]
    length, zeros = conditioner.parts[-1].length, conditioner.zeros_for_none
    return ConditionSource(partial(read_both_tokens, tokenizers, length, zeros), tells_sizes=True)


def read_both_tokens(tokenizers: Sequence[Any], length: int, zeros: bool, captions: Sequence[str]) -> Tokens:
    """`length` tokens of each caption by each tokenizer."""
    first, second = (read_tokens(one, length, False, partial(expanded, one), captions).input_ids for one in tokenizers)
    return Tokens(first, second=second, empty=are_empty(captions) if zeros else None)


def expanded(tokenizer: Any, caption: str) -> str:
    """With words of several vectors written out."""
    return expand_words([caption], tokenizer)[0]


def read_joint(cache: JointTextCache, captions: Sequence[str]) -> Conditioning:
    return cache.conditioning(captions)


def caption_conditioner(pipeline: Any, device: torch.device) -> CaptionConditioner:
    """Of the text encoders of an SDXL pipeline."""
    return CaptionConditioner(
        pipeline.tokenizer_2,
        pipeline.text_encoder_2,
        device,
        warn=False,
        zeros_for_none=bool(pipeline.config.force_zeros_for_empty_prompt),
        first=(pipeline.tokenizer, pipeline.text_encoder),
    )
