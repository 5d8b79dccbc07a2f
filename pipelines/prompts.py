"""Prompts, negative prompts and given embeddings, brought to one batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.text.encode import as_prompts, encode_prompts, max_tokens
from latentdiff.text.tokens import count_chunks

Prompt = str | list[str] | None
LONG_PROMPTS = ("cut", "chunk")


@dataclass(frozen=True)
class PromptEncoder:
    """A pipeline's text encoder, with what one call asks of it.

    ``clip_skip`` counts for prompts and not for negative prompts, as in diffusers' ``StableDiffusionPipeline``.
    ``prompt_weights`` and ``long_prompts`` ("cut" or "chunk") count for both, and not for embeddings that are given.

    Raises:
        ValueError: another ``long_prompts``.
    """

    tokenizer: Any
    text_encoder: Any
    device: torch.device
    dtype: torch.dtype
    images_per_prompt: int = 1
    clip_skip: int | None = None
    prompt_weights: bool = False
    long_prompts: str = "cut"

    def __post_init__(self) -> None:
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts={self.long_prompts!r} is not known; choose from {', '.join(LONG_PROMPTS)}")

    def encode(
        self,
        prompt: Prompt,
        negative_prompt: Prompt,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        guided: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """States (B, L, D) of what to draw and, if `guided`, of what to keep away from.

        Raises:
            TypeError: a prompt is not a string nor a list of strings.
            ValueError: a prompt and its embeddings are both given, or neither; numbers or shapes that do not match.
        """
        count = count_prompts(prompt, prompt_embeds)
        check_either("negative_prompt", negative_prompt, negative_prompt_embeds)
        positives = None if prompt_embeds is not None else as_prompts(prompt)
        negatives = None
        if guided and negative_prompt_embeds is None:
            negatives = as_prompts("" if negative_prompt is None else negative_prompt, "negative_prompt")
            negatives = negatives * count if len(negatives) == 1 else negatives
            if len(negatives) != count:
                raise ValueError(f"{len(negatives)} negative prompts were given for {count} prompts; give one for each")
        chunks = self._chunks([*(positives or []), *(negatives or [])])
        if positives is not None:
            prompt_embeds = self._states(positives, self.clip_skip, chunks)
        assert prompt_embeds is not None
        check_embeds("prompt_embeds", prompt_embeds)
        if not guided:
            return self._repeat(prompt_embeds), None
        if negatives is not None:
            length: int | None = None
            if positives is None:
                chunks, length = self._as_long_as(prompt_embeds)
            negative_prompt_embeds = self._states(negatives, None, chunks, length)
        assert negative_prompt_embeds is not None
        check_embeds("negative_prompt_embeds", negative_prompt_embeds)
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ValueError(
                f"prompt_embeds and negative_prompt_embeds must have the same shape, not {tuple(prompt_embeds.shape)} "
                f"and {tuple(negative_prompt_embeds.shape)}"
            )
        return self._repeat(prompt_embeds), self._repeat(negative_prompt_embeds)

    def _chunks(self, prompts: list[str]) -> int:
        """In how many parts to encode every one of a call's prompts."""
        if self.long_prompts == "cut" or self.text_encoder is None or not prompts:
            return 1
        length = max_tokens(self.tokenizer, self.text_encoder)
        return count_chunks(prompts, self.tokenizer, length, self.prompt_weights)

    def _as_long_as(self, embeds: Tensor) -> tuple[int, int]:
        """In how many parts, of how many tokens, to encode prompts that go with `embeds` (B, L, D)."""
        length = embeds.shape[1]
        if self.text_encoder is None:
            return 1, length
        whole = max_tokens(self.tokenizer, self.text_encoder)
        return (length // whole, whole) if length % whole == 0 else (1, length)

    def _states(self, prompts: list[str], clip_skip: int | None, chunks: int, length: int | None = None) -> Tensor:
        if self.text_encoder is None:
            raise ValueError("this pipeline has no text encoder; give prompt_embeds and negative_prompt_embeds")
        return encode_prompts(
            prompts,
            self.tokenizer,
            self.text_encoder,
            max_length=length,
            clip_skip=clip_skip,
            device=self.device,
            weights=self.prompt_weights,
            chunks=chunks,
        )

    def _repeat(self, embeds: Tensor) -> Tensor:
        """(P, L, D) -> (B, L, D): every prompt `images_per_prompt` times in a row."""
        return embeds.to(self.device, self.dtype).repeat_interleave(self.images_per_prompt, dim=0)


def check_either(name: str, prompt: Prompt, embeds: Tensor | None) -> None:
    if prompt is not None and embeds is not None:
        raise ValueError(f"give either {name} or {name}_embeds, not both")


def check_embeds(name: str, embeds: Tensor) -> None:
    if embeds.ndim != 3:
        raise ValueError(f"{name} must have the shape (prompts, tokens, width), not {tuple(embeds.shape)}")


def count_prompts(prompt: Prompt, prompt_embeds: Tensor | None) -> int:
    """How many prompts a call has.

    Raises:
        TypeError, ValueError: see `PromptEncoder.encode`.
    """
    check_either("prompt", prompt, prompt_embeds)
    if prompt is None and prompt_embeds is None:
        raise ValueError("give a prompt, or prompt_embeds")
    return len(as_prompts(prompt) if prompt_embeds is None else prompt_embeds)
