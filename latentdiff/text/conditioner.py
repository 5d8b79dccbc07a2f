"""Prompts to conditions, with a text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from latentdiff.conditioning import Conditioning
from latentdiff.text.encode import TOKENIZING, encode_prompts, max_tokens
from latentdiff.text.tokens import count_chunks

LONG_PROMPTS = ("cut", "chunk")


@dataclass(frozen=True)
class TextConditioner:
    """A tokenizer and a text encoder of transformers, with the options of `encode_prompts`.

    Args:
        device: where the encoder runs; by default where it is.
        max_length: L; by default as many tokens as the encoder takes.
        clip_skip: take the states this many layers before the last (CLIP only).
        prompt_weights: read ``(red:1.3)``, ``(red)`` and ``[red]`` as weights.
        long_prompts: what becomes of a prompt longer than L: ``"cut"``, or ``"chunk"``, encoded in parts.
        warn: log what is cut.

    Raises:
        ValueError: another ``long_prompts``.
    """

    tokenizer: Any
    text_encoder: Any
    device: torch.device | None = None
    max_length: int | None = None
    clip_skip: int | None = None
    prompt_weights: bool = False
    long_prompts: Literal["cut", "chunk"] = "cut"
    warn: bool = True

    def __post_init__(self) -> None:
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts={self.long_prompts!r} is not known; choose from {', '.join(LONG_PROMPTS)}")

    def __call__(self, prompts: Sequence[str], chunks: int | None = None) -> Conditioning:
        """P prompts -> states (P, chunks L, D).

        chunks: in how many parts; by default as many as the longest needs.

        Raises:
            TypeError: a prompt is not a string.
            ValueError: see `encode_prompts`; or there is no text encoder.
        """
        if self.text_encoder is None:
            raise ValueError("there is no text encoder; give prompt_embeds and negative_prompt_embeds")
        states = encode_prompts(
            prompts,
            self.tokenizer,
            self.text_encoder,
            max_length=self.max_length,
            clip_skip=self.clip_skip,
            device=self.device,
            warn=self.warn,
            weights=self.prompt_weights,
            chunks=self.chunks(prompts) if chunks is None else chunks,
        )
        return Conditioning(states=states)

    def chunks(self, prompts: Sequence[str]) -> int:
        """In how many parts the longest of these prompts is encoded."""
        if self.long_prompts == "cut" or self.text_encoder is None or not prompts:
            return 1
        length = self.max_length or max_tokens(self.tokenizer, self.text_encoder)
        with TOKENIZING:
            return count_chunks(prompts, self.tokenizer, length, self.prompt_weights)

    def of_length(self, tokens: int) -> tuple["TextConditioner", int]:
        """A conditioner, and a number of chunks, for states of `tokens` tokens: as many as given states have."""
        if self.text_encoder is None:
            return self, 1
        whole = max_tokens(self.tokenizer, self.text_encoder)
        if tokens % whole == 0:
            return replace(self, max_length=whole), tokens // whole
        return replace(self, max_length=tokens), 1
