"""Prompts to conditions as SDXL (Podell et al. 2023, Sec. 2.1) makes them: of two CLIP text encoders, or the second."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.text.encode import TextConditioner, as_prompts


def penultimate(text_encoder: Any, input_ids: Tensor, skip: int = 0) -> Conditioning:
    """(B, L) -> states (B, L, D) of a CLIP's last layer but one, or of one `skip` layers before, and pooled ones."""
    output = text_encoder(input_ids, output_hidden_states=True)
    layers = len(output.hidden_states) - 1
    if not 0 <= skip < layers:
        raise ValueError(f"clip_skip must lie in [0, {layers - 1}] for this encoder, not {skip}")
    return Conditioning(output.hidden_states[-(skip + 2)], pooled=output.get("text_embeds"))


def side_by_side(parts: Sequence[Conditioning]) -> Conditioning:
    """The states of several encoders, (B, L, D1 + D2), and the pooled embedding of the last."""
    states = torch.cat([one.states for one in parts if one.states is not None], dim=-1)
    return Conditioning(states, pooled=parts[-1].pooled)


def zeroed(conditioning: Conditioning, empty: Tensor) -> Conditioning:
    """With zeros where `empty` (B,) is true."""
    return Conditioning(
        **{
            name: tensor.masked_fill(empty.to(tensor.device).view(-1, *(1,) * (tensor.ndim - 1)), 0)
            for name, tensor in conditioning.items()
        }
    )


@dataclass(frozen=True)
class PenultimateConditioner(TextConditioner):
    """States of the last layer but one, without the encoder's last norm, and a pooled embedding if it projects one."""

    def _encoded(self, tokens: Any) -> Conditioning:
        encoder = self.text_encoder
        return penultimate(encoder, tokens.input_ids.to(self.device or encoder.device), self.clip_skip or 0)


@dataclass(frozen=True)
class JointTextConditioner(TextConditioner):
    """The states of two text encoders side by side, (P, L, D1 + D2), and the pooled embedding of the second.

    The options are a `TextConditioner`'s, whose ``tokenizer`` and ``text_encoder`` are the second ones, the only ones
    of SDXL's refiner.

    Args:
        first: tokenizer and text encoder that come before, or None.

    Raises:
        ValueError: the encoders take different numbers of tokens.
    """

    first: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {one.length for one in self.parts if one.text_encoder is not None}
        if len(lengths) > 1:
            raise ValueError(f"the two text encoders take different numbers of tokens, {sorted(lengths)}")

    @property
    def parts(self) -> list[PenultimateConditioner]:
        """One for each encoder."""
        both = [(self.tokenizer, self.text_encoder)]
        if self.first is not None:
            both.insert(0, self.first)
        names = ("device", "max_length", "clip_skip", "prompt_weights", "long_prompts")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        # what the first cuts the second cuts too
        return [PenultimateConditioner(*one, **options, warn=self.warn and i == 0) for i, one in enumerate(both)]

    def __call__(
        self, prompts: Sequence[str], chunks: int | None = None, second: Sequence[str] | None = None
    ) -> Conditioning:
        """P prompts -> states (P, chunks L, D1 + D2) and a pooled embedding (P, D'); see `TextConditioner`.

        second: P prompts that the second encoder reads instead.

        Raises:
            ValueError: there is no first encoder, and ``second`` is given.
        """
        prompts = as_prompts(prompts)
        if second is not None and self.first is None:
            raise ValueError("this model has one text encoder, which reads the prompt; leave prompt_2 out")
        texts = [prompts, prompts if second is None else second][-len(self.parts) :]
        chunks = self.chunks([*prompts, *(second or [])]) if chunks is None else chunks
        encoded = [part(text, chunks) for part, text in zip(self.parts, texts, strict=True)]
        return side_by_side(encoded)

    def chunks(self, prompts: Sequence[str]) -> int:
        return max(TextConditioner.chunks(part, prompts) for part in self.parts)

    def without_skip(self) -> "JointTextConditioner":
        return replace(self, clip_skip=None)
