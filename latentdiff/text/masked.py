"""Prompts to conditions whose padding is hidden, from the encoder and from the denoiser: PixArt-alpha's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.text.encode import TextConditioner, as_prompts

LONGEST = 120
"""Tokens; PixArt-alpha (Chen et al. 2023), Sec. 3.1."""


@dataclass(frozen=True)
class MaskedTextConditioner(TextConditioner):
    """A `TextConditioner` as diffusers' ``PixArtAlphaPipeline`` reads prompts, without its cleaning of captions.

    Prompts are stripped, and their letters made small. The states of padding are zeros, by which `with_mask` knows them
    again: as states are kept and passed around, no mask has to go with them.
    """

    def __call__(self, prompts: Sequence[str], chunks: int | None = None) -> Conditioning:
        return with_mask(super().__call__([prompt.lower().strip() for prompt in as_prompts(prompts)], chunks))

    @property
    def hides_padding(self) -> bool:
        return True

    @property
    def length(self) -> int:
        """L, at most `LONGEST` by default."""
        positions = getattr(self.text_encoder.config, "max_position_embeddings", None) or LONGEST
        return self.max_length or int(min(LONGEST, self.tokenizer.model_max_length, positions))

    def _states(self, tokens: Any) -> Tensor:
        states = super()._states(tokens)
        return states * tokens.attention_mask[..., None].to(states)


def counting(states: Tensor | None, mask: Tensor | None, name: str) -> Tensor | None:
    """States (B, L, D) with zeros where a mask (B, L) is 0, by which `with_mask` knows it again.

    Raises:
        ValueError: there are no states, or of another shape; the message begins with `name`.
    """
    if mask is None:
        return states
    if states is None or mask.shape != states.shape[:2]:
        shape = "none are given" if states is None else f"they are {tuple(states.shape)}"
        raise ValueError(
            f"{name}_attention_mask is {tuple(mask.shape)}, for {name}_embeds (prompts, L, D), and {shape}"
        )
    return states * mask[..., None].to(states)


def with_mask(conditioning: Conditioning) -> Conditioning:
    """With the mask of its states: what is zero all through is padding."""
    states = conditioning.states
    return conditioning if states is None else conditioning.replace(mask=(states != 0).any(-1))
