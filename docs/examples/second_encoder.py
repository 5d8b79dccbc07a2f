"""A conditioner as an extension, and a kind of pipeline that has it: the states of two text encoders in a row."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from latentdiff.conditioning import Conditioning
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.pipelines.registry import Kind, register
from latentdiff.text import max_tokens
from latentdiff.text.encode import TextConditioner


@dataclass(frozen=True)
class TwoEncoders(TextConditioner):
    """States (P, chunks (L + L2), D): of the first text encoder, then of the second, which must be as wide."""

    second: TextConditioner | None = None

    def __call__(self, prompts: Sequence[str], chunks: int | None = None) -> Conditioning:
        chunks = self.chunks(prompts) if chunks is None else chunks
        assert self.second is not None
        made = (super().__call__(prompts, chunks), self.second(prompts, chunks))
        states = [one.states for one in made if one.states is not None]
        widths = [one.shape[-1] for one in states]
        if len(set(widths)) > 1:
            raise ValueError(f"the two text encoders must be equally wide, not {widths[0]} and {widths[1]}")
        return Conditioning(states=torch.cat(states, dim=1))

    def chunks(self, prompts: Sequence[str]) -> int:
        assert self.second is not None
        return max(super().chunks(prompts), self.second.chunks(prompts))

    def of_length(self, tokens: int) -> tuple[TextConditioner, int]:
        assert self.second is not None
        pairs = ((one.tokenizer, one.text_encoder) for one in (self, self.second))
        whole = sum(max_tokens(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None)
        if whole and tokens % whole:
            raise ValueError(
                f"prompt_embeds of these two text encoders have {whole} tokens, or a multiple, not {tokens}"
            )
        return self, tokens // whole if whole else 1


class TwoEncoderPipeline(TextToImagePipeline):
    """Text to image, for a UNet that reads two text encoders.

    Args:
        text_encoder_2, tokenizer_2: the second ones.
        others: as of `TextToImagePipeline`.
    """

    saved_class_name = "TwoEncoderPipeline"
    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        first = (vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder)
        super().__init__(*first, requires_safety_checker)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2)

    def conditioner(self, device: torch.device, *options: Any) -> TextConditioner:
        own = super().conditioner(device, *options)
        second = replace(own, tokenizer=self.tokenizer_2, text_encoder=self.text_encoder_2, clip_skip=None)
        return TwoEncoders(**vars(own), second=second)


register(Kind("TwoEncoderPipeline", __name__, ("TwoEncoderPipeline",), "text"))
