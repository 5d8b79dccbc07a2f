"""Prompts to text states, with any text encoder of transformers and its tokenizer."""

import logging
from collections.abc import Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from latentdiff.text.tokens import tokenize, weigh
from latentdiff.text.words import expand_words

logger = logging.getLogger(__name__)

TOKENIZING = RLock()
"""Held while a tokenizer works: transformers' keep the last call's options, and fail or cut wrongly in threads."""

UNLIMITED = 1_000_000  # transformers writes 1e30 for "the tokenizer does not know"


def as_prompts(value: Any, name: str = "prompt") -> list[str]:
    """One prompt or several, as a list.

    Raises:
        TypeError: not a string, nor a list or tuple of strings.
        ValueError: an empty list.
    """
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"{name} must be a string or a list of strings, not {type(value).__name__} ({value!r})")
    if not prompts:
        raise ValueError(f"{name} is an empty list; give at least one string")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"{name}[{i}] must be a string, not {type(prompt).__name__} ({prompt!r})")
    return list(prompts)


def max_tokens(tokenizer: Any, text_encoder: Any) -> int:
    """How many tokens L the encoder takes, special tokens among them.

    Raises:
        ValueError: neither the tokenizer nor the encoder's config says so.
    """
    positions = getattr(text_encoder.config, "max_position_embeddings", None) or UNLIMITED
    length = min(tokenizer.model_max_length, positions)
    if length >= UNLIMITED:
        raise ValueError(
            f"neither the {type(tokenizer).__name__} nor the {type(text_encoder).__name__} says how many tokens it "
            f"takes; set tokenizer.model_max_length (model_max_length in tokenizer_config.json)"
        )
    return int(length)


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Any,
    text_encoder: Any,
    *,
    max_length: int | None = None,
    clip_skip: int | None = None,
    device: torch.device | None = None,
    warn: bool = True,
    weights: bool = False,
    chunks: int = 1,
) -> Tensor:
    """The text encoder's states for each prompt, padded to one length: (B, L, D) in the encoder's dtype.

    Padding is hidden from the encoder if its config says ``use_attention_mask``; this, and the rest, is what
    diffusers' ``StableDiffusionPipeline`` does. A prompt that is too long is cut, with a warning that shows the part.

    Args:
        prompts: B strings; "" stands for no prompt.
        tokenizer, text_encoder: of transformers; CLIP, BERT and its kin, T5.
        max_length: L; by default as many tokens as the encoder takes.
        clip_skip: take the states this many layers before the last one (CLIP only).
        device: where the encoder runs; by default where it is.
        warn: log what is cut of prompts that are too long.
        weights: read weights from the prompts, see `weights.parse_weights`.
        chunks: how many parts to encode a prompt in, one after the other, each with the special tokens of a whole one;
            then the result is (B, chunks L, D). `tokens.count_chunks` gives the number that is needed.

    Raises:
        TypeError: a prompt is not a string.
        ValueError: L is unknown, or clip_skip is not possible with this encoder; a bracket of a weight has no partner.
    """
    prompts = as_prompts(prompts)
    max_length = max_length or max_tokens(tokenizer, text_encoder)
    device = device or text_encoder.device
    if not weights and chunks == 1:
        with TOKENIZING:
            prompts = expand_words(prompts, tokenizer)
            tokens = tokenizer(
                prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
            )
            if warn:
                warn_of_cuts(prompts, tokenizer, max_length)
        return text_states(tokens.input_ids, tokens.attention_mask, text_encoder, clip_skip, device)

    with TOKENIZING:
        parts = tokenize(prompts, tokenizer, max_length, weights=weights, chunks=chunks)
        nothing = tokenize([""], tokenizer, max_length)
    for cut in parts.cut if warn else []:
        warn_of_cut(cut, chunks * max_length)
    states = text_states(parts.input_ids, parts.attention_mask, text_encoder, clip_skip, device)  # (B chunks, L, D)
    if (parts.weights != 1).any():
        empty = text_states(nothing.input_ids, nothing.attention_mask, text_encoder, clip_skip, device)
        states = weigh(states, empty, parts.weights)
    return states.reshape(len(prompts), chunks * max_length, -1)


def text_states(
    input_ids: Tensor, attention_mask: Tensor, text_encoder: Any, clip_skip: int | None, device: torch.device
) -> Tensor:
    """Tokens (B, L) -> states (B, L, D)."""
    mask = attention_mask.to(device) if getattr(text_encoder.config, "use_attention_mask", False) else None
    output = text_encoder(input_ids.to(device), attention_mask=mask, output_hidden_states=clip_skip is not None)
    if clip_skip is None:
        return output[0]  # (B, L, D)
    return skip_layers(text_encoder, output.hidden_states, clip_skip)


def skip_layers(text_encoder: Any, hidden_states: Sequence[Tensor], clip_skip: int) -> Tensor:
    """CLIP's states `clip_skip` layers before the last, after the final normalisation. (B, L, D)"""
    body = getattr(text_encoder, "text_model", text_encoder)
    if not hasattr(body, "final_layer_norm"):
        raise ValueError(f"clip_skip needs a CLIP text encoder, not a {type(text_encoder).__name__}")
    if not 0 <= clip_skip < len(hidden_states) - 1:
        raise ValueError(f"clip_skip must lie in [0, {len(hidden_states) - 2}] for this encoder, not {clip_skip}")
    return body.final_layer_norm(hidden_states[-(clip_skip + 1)])


def warn_of_cuts(prompts: Sequence[str], tokenizer: Any, max_length: int) -> None:
    """Log what the encoder will not see of prompts longer than `max_length` tokens."""
    for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids:
        if len(ids) > max_length:
            warn_of_cut(tokenizer.decode(ids[max_length - 1 : -1], skip_special_tokens=True).strip(), max_length)


def warn_of_cut(cut: str, length: int) -> None:
    if cut:
        logger.warning(
            "The text encoder takes %d tokens; this part of the prompt was cut: %r (long_prompts='chunk' keeps it)",
            *(length, cut),
        )
