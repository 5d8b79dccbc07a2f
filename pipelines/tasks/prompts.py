"""Prompts, negative prompts and given embeddings of one call, read once and brought to one batch."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.text.conditioner import TextConditioner
from latentdiff.text.encode import as_prompts
from latentdiff.text.weights import without_weights

PromptArgument = str | list[str] | None


@dataclass(frozen=True)
class Prompts:
    """What to draw, as texts or as text states, and what to keep away from."""

    texts: list[str] | None
    states: Tensor | None
    """(P, L, D), instead of texts."""
    negative: PromptArgument = None
    negative_states: Tensor | None = None

    @classmethod
    def read(
        cls,
        prompt: PromptArgument,
        negative_prompt: PromptArgument = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> "Prompts":
        """From the arguments of a call.

        Raises:
            TypeError: a prompt is not a string nor a list of strings.
            ValueError: a prompt and its embeddings are both given, or neither.
        """
        check_either("prompt", prompt, prompt_embeds)
        check_either("negative_prompt", negative_prompt, negative_prompt_embeds)
        if prompt is None and prompt_embeds is None:
            raise ValueError("give a prompt, or prompt_embeds")
        texts = as_prompts(prompt) if prompt_embeds is None else None
        return cls(texts, prompt_embeds, negative_prompt, negative_prompt_embeds)

    def __len__(self) -> int:
        """P"""
        given: Any = self.states if self.texts is None else self.texts
        return len(given)

    def captions(self, prompt_weights: bool) -> list[str] | None:
        """The texts without the weights that they may have, for those that do not read weights."""
        if self.texts is None or not prompt_weights:
            return self.texts
        return [without_weights(text) for text in self.texts]

    def encode(self, conditioner: TextConditioner, guided: bool) -> GuidedConditioning:
        """The conditions of P images; with both sides if `guided`.

        ``clip_skip`` counts for prompts and not for negative prompts, as in diffusers' ``StableDiffusionPipeline``.
        Weights and chunks count for both, and not for embeddings that are given.

        Raises:
            TypeError, ValueError: a negative prompt is of a wrong type; numbers or shapes that do not match.
        """
        negatives = self._negatives() if guided else []
        chunks = conditioner.chunks([*(self.texts or []), *negatives])
        positive = Conditioning(states=self.states) if self.texts is None else conditioner(self.texts, chunks)
        length = check_embeds("prompt_embeds", positive).shape[1]
        if not guided:
            return GuidedConditioning(positive)
        negative = Conditioning(states=self.negative_states)
        if self.negative_states is None:
            encoder = replace(conditioner, clip_skip=None)
            if self.texts is None:
                encoder, chunks = encoder.of_length(length)
            negative = encoder(negatives, chunks)
        shapes = [
            tuple(check_embeds(f"{name}prompt_embeds", one).shape)
            for name, one in (("", positive), ("negative_", negative))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"prompt_embeds and negative_prompt_embeds must have the same shape, not {shapes[0]} and {shapes[1]}"
            )
        return GuidedConditioning(positive, negative)

    def _negatives(self) -> list[str]:
        """A negative prompt for each prompt; none where its states are given."""
        if self.negative_states is not None:
            return []
        negatives = as_prompts("" if self.negative is None else self.negative, "negative_prompt")
        negatives = negatives * len(self) if len(negatives) == 1 else negatives
        if len(negatives) != len(self):
            raise ValueError(f"{len(negatives)} negative prompts were given for {len(self)} prompts; give one for each")
        return negatives


def check_either(name: str, prompt: PromptArgument, embeds: Tensor | None) -> None:
    if prompt is not None and embeds is not None:
        raise ValueError(f"give either {name} or {name}_embeds, not both")


def check_embeds(name: str, conditioning: Conditioning) -> Tensor:
    """The text states. Raises ValueError if they are no states."""
    states = conditioning.states
    if states is None or states.ndim != 3:
        shape = None if states is None else tuple(states.shape)
        raise ValueError(f"{name} must have the shape (prompts, tokens, width), not {shape}")
    return states
