"""Prompts to conditions, with any text encoder of transformers and its tokenizer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.text.tokenizing import tokenizing
from latentdiff.text.tokens import Frame, count_chunks, tokenize, weigh
from latentdiff.text.words import as_written, expand_words

logger = logging.getLogger(__name__)

UNLIMITED = 1_000_000  # transformers writes 1e30 for "the tokenizer does not know"
LONG_PROMPTS = ("cut", "chunk")
SHOWN = 300  # characters, at most, of what was cut


@dataclass(frozen=True)
class Prompts:
    """P prompts of a call, as texts or as text states, and what to keep away from: one for all, or one for each.

    Args:
        prompt_embeds, negative_prompt_embeds: (P, L, D), instead of texts.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (P, D'), with those, for SDXL.
        prompt_2, negative_prompt_2: what the second text encoder reads instead, for SDXL; one for all, or one for each.

    Raises:
        TypeError: a prompt is not a string nor a list of strings.
        ValueError: a prompt and its embeddings are both given, or neither; or a pooled embedding without the others, or
            a prompt for the second encoder without the first's.
    """

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    prompt_2: str | list[str] | None = None
    negative_prompt_2: str | list[str] | None = None

    def __post_init__(self) -> None:
        for side in ("", "negative_"):
            pooled, states = getattr(self, f"{side}pooled_prompt_embeds"), getattr(self, f"{side}prompt_embeds")
            if pooled is not None and (states is None or len(states) != len(pooled)):
                raise ValueError(f"{side}pooled_prompt_embeds needs {side}prompt_embeds of as many prompts with it")
        for name in ("prompt", "negative_prompt"):
            if getattr(self, name) is not None and getattr(self, f"{name}_embeds") is not None:
                raise ValueError(f"give either {name} or {name}_embeds, not both")
        if self.prompt_embeds is None:
            if self.prompt is None:
                raise ValueError("give a prompt, or prompt_embeds")
            object.__setattr__(self, "prompt", as_prompts(self.prompt))
        for name in ("prompt", "negative_prompt"):
            if getattr(self, f"{name}_2") is not None and getattr(self, name) is None:
                raise ValueError(f"{name}_2 needs a {name}, which the first text encoder reads")

    @property
    def texts(self) -> list[str] | None:
        """P prompts; None if their states are given."""
        return None if self.prompt is None else list(self.prompt)

    def __len__(self) -> int:
        """P"""
        return len(self.prompt if self.prompt_embeds is None else self.prompt_embeds)  # type: ignore[arg-type]

    def encode(self, conditioner: "TextConditioner", guided: bool) -> GuidedConditioning:
        """The conditions of P images; with both sides if `guided`.

        ``clip_skip`` counts for prompts and not for negative prompts, as in diffusers' ``StableDiffusionPipeline``.
        Weights and chunks count for both, and not for embeddings that are given.

        Raises:
            TypeError, ValueError: a negative prompt is of a wrong type; numbers or shapes that do not match.
        """
        texts, negatives = self.texts, self._negatives() if guided else []
        second, negatives_2 = self._second("prompt_2"), self._second("negative_prompt_2") if guided else []
        chunks = conditioner.chunks([*(texts or []), *negatives, *second, *negatives_2])
        given = Conditioning(states=self.prompt_embeds, pooled=self.pooled_prompt_embeds)
        positive = given if texts is None else conditioner(texts, chunks, *([second] if second else []))
        shape = states_shape("prompt_embeds", positive)
        if not guided:
            return GuidedConditioning(positive)
        negative = Conditioning(states=self.negative_prompt_embeds, pooled=self.negative_pooled_prompt_embeds)
        if self.negative_prompt_embeds is None and self.negative_prompt is None and conditioner.zeros_for_none:
            negative = Conditioning(**{name: torch.zeros_like(tensor) for name, tensor in positive.items()})
        elif self.negative_prompt_embeds is None:
            encoder = conditioner.without_skip()
            if texts is None:
                encoder, chunks = encoder.of_length(shape[1])
            negative = encoder(negatives, chunks, *([negatives_2] if negatives_2 else []))
        negative_shape = states_shape("negative_prompt_embeds", negative)
        if shape != negative_shape:
            raise ValueError(
                f"prompt_embeds and negative_prompt_embeds must have the same shape, not {shape} and {negative_shape}"
            )
        return GuidedConditioning(positive, negative)

    def _negatives(self) -> list[str]:
        """A negative prompt for each prompt; none where its states are given."""
        if self.negative_prompt_embeds is not None:
            return []
        return self._each("" if self.negative_prompt is None else self.negative_prompt, "negative_prompt")

    def _second(self, name: str) -> list[str]:
        """What the second text encoder reads for each prompt; none where it reads what the first does."""
        value = getattr(self, name)
        return [] if value is None else self._each(value, name)

    def _each(self, value: str | list[str], name: str) -> list[str]:
        texts = as_prompts(value, name)
        texts = texts * len(self) if len(texts) == 1 else texts
        if len(texts) != len(self):
            kind = name.removesuffix("_2").replace("_", " ")
            where = "" if name == "negative_prompt" else f" ({name})"
            raise ValueError(f"{len(texts)} {kind}s{where} were given for {len(self)} prompts; give one for each")
        return texts


def states_shape(name: str, conditioning: Conditioning) -> tuple[int, ...]:
    """Raises ValueError for what cannot be text states (P, L, D)."""
    shape = None if conditioning.states is None else tuple(conditioning.states.shape)
    if shape is None or len(shape) != 3:
        raise ValueError(f"{name} must have the shape (prompts, tokens, width), not {shape}")
    return shape


@dataclass(frozen=True)
class TextConditioner:
    """A tokenizer and a text encoder of transformers, which make states of prompts.

    All is done as in diffusers' ``StableDiffusionPipeline``: states are padded to one length, and padding is hidden
    from the encoder if its config says ``use_attention_mask``. A prompt that is too long is cut, with a warning that
    shows the part, once for each text.

    Args:
        tokenizer, text_encoder: of transformers; CLIP, BERT and its kin, T5.
        device: where the encoder runs; by default where it is.
        max_length: L; by default as many tokens as the encoder takes.
        clip_skip: take the states this many layers before the last (CLIP only).
        prompt_weights: read ``(red:1.3)``, ``(red)`` and ``[red]`` as weights, see `tokens.parse_weights`.
        long_prompts: what becomes of a prompt longer than L: ``"cut"``, or ``"chunk"``, encoded in parts, one after the
            other, each with the special tokens of a whole one.
        warn: log what is cut.
        zeros_for_none: where no negative prompt is given, zeros stand for its conditions; "" is encoded.

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
    zeros_for_none: bool = False

    def __post_init__(self) -> None:
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts={self.long_prompts!r} is not known; choose from {', '.join(LONG_PROMPTS)}")

    def __call__(self, prompts: Sequence[str], chunks: int | None = None) -> Conditioning:
        """P prompts -> states (P, chunks L, D) in the encoder's dtype; "" stands for no prompt.

        chunks: in how many parts; by default as many as the longest needs.

        Raises:
            TypeError: a prompt is not a string.
            ValueError: there is no text encoder, L is unknown, or clip_skip is not possible with this encoder; a
                bracket of a weight has no partner.
        """
        if self.text_encoder is None:
            raise ValueError("there is no text encoder; give prompt_embeds and negative_prompt_embeds")
        prompts, tokenizer, length = as_prompts(prompts), self.tokenizer, self.length
        chunks = self.chunks(prompts) if chunks is None else chunks
        if not self.prompt_weights and chunks == 1:
            with tokenizing(tokenizer):
                prompts = expand_words(prompts, tokenizer)
                tokens = tokenizer(
                    prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                if self.warn:
                    warn_of_cuts(prompts, tokenizer, length)
            return self._encoded(tokens)

        with tokenizing(tokenizer):
            parts = tokenize(prompts, tokenizer, length, weights=self.prompt_weights, chunks=chunks)
            nothing = tokenize([""], tokenizer, length)
        for cut in parts.cut if self.warn else []:
            warn_of_cut(as_written(cut, tokenizer), chunks * length)
        encoded = self._encoded(parts)
        states = encoded.states  # (P chunks, L, D)
        assert states is not None
        if (parts.weights != 1).any():
            without = self._encoded(nothing).states
            assert without is not None
            states = weigh(states, without, parts.weights)
        # of a prompt in parts the first one's embedding stands for the whole
        pooled = None if encoded.pooled is None else encoded.pooled[::chunks]
        return Conditioning(states=states.reshape(len(prompts), chunks * length, -1), pooled=pooled)

    def limited(self, length: int) -> Self:
        """The same with fewer tokens.

        Raises:
            ValueError: they would be more.
        """
        if length > self.length:
            raise ValueError(f"max_sequence_length={length} is more than the {self.length} tokens of this model")
        return replace(self, max_length=length)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Of each prompt what has no place among L tokens, as it is written; "" if all has."""
        with tokenizing(self.tokenizer):
            if self.prompt_weights:
                cut = tokenize(prompts, self.tokenizer, self.length, weights=True).cut
            else:
                cut = [cut_of(one, self.tokenizer, self.length) for one in expand_words(prompts, self.tokenizer)]
        return [as_written(one, self.tokenizer) for one in cut]

    @property
    def length(self) -> int:
        """L"""
        return self.max_length or max_tokens(self.tokenizer, self.text_encoder)

    def _encoded(self, tokens: Any) -> Conditioning:
        """``input_ids`` and ``attention_mask`` (B, L) -> states (B, L, D)."""
        return Conditioning(states=self._states(tokens))

    def _states(self, tokens: Any) -> Tensor:
        encoder, skip = self.text_encoder, self.clip_skip
        device = self.device or encoder.device
        mask = tokens.attention_mask.to(device) if self.hides_padding else None
        output = encoder(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=skip is not None)
        if skip is None:
            return output[0]
        body, layers = getattr(encoder, "text_model", encoder), len(output.hidden_states) - 1
        if not hasattr(body, "final_layer_norm"):
            raise ValueError(f"clip_skip needs a CLIP text encoder, not a {type(encoder).__name__}")
        if not 0 <= skip < layers:
            raise ValueError(f"clip_skip must lie in [0, {layers - 1}] for this encoder, not {skip}")
        return body.final_layer_norm(output.hidden_states[-(skip + 1)])

    @property
    def hides_padding(self) -> bool:
        """Whether padding is hidden from the encoder."""
        return bool(getattr(self.text_encoder.config, "use_attention_mask", False))

    def chunks(self, prompts: Sequence[str]) -> int:
        """In how many parts the longest of these prompts is encoded."""
        if self.long_prompts == "cut" or self.text_encoder is None or not prompts:
            return 1
        with tokenizing(self.tokenizer):
            return count_chunks(prompts, self.tokenizer, self.length, self.prompt_weights)

    def without_skip(self) -> "TextConditioner":
        """One that takes the states of the usual layer."""
        return replace(self, clip_skip=None)

    def of_length(self, tokens: int) -> tuple["TextConditioner", int]:
        """A conditioner, and a number of chunks, for states of `tokens` tokens: as many as given states have."""
        if self.text_encoder is None:
            return self, 1
        whole = replace(self, max_length=None).length
        if tokens % whole == 0:
            return replace(self, max_length=whole), tokens // whole
        return replace(self, max_length=tokens), 1


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
    weights: bool = False,
    chunks: int = 1,
    **options: Any,
) -> Tensor:
    """Text states (B, chunks L, D) of B prompts, as a `TextConditioner` makes them: see there.

    Args:
        weights: its ``prompt_weights``.
        chunks: how many parts to encode a prompt in; `tokens.count_chunks` gives the number that is needed.
        options: its others: ``max_length``, ``clip_skip``, ``device``, ``warn``.
    """
    conditioner = TextConditioner(tokenizer, text_encoder, prompt_weights=weights, **options)
    states = conditioner(prompts, chunks).states
    assert states is not None
    return states


def warn_of_cuts(prompts: Sequence[str], tokenizer: Any, max_length: int) -> None:
    for prompt in prompts:
        warn_of_cut(as_written(cut_of(prompt, tokenizer, max_length), tokenizer), max_length)


def cut_of(prompt: str, tokenizer: Any, max_length: int) -> str:
    """What a prompt says after the last token that has a place; "" if all have. Its own characters if the tokenizer is
    fast, which says where they are.
    """
    room, fast = Frame.of(tokenizer).room(max_length), bool(getattr(tokenizer, "is_fast", False))
    more = {"return_offsets_mapping": True} if fast else {}
    encoded = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False, **more)
    if len(encoded.input_ids) <= room:
        return ""
    if not fast:
        return str(tokenizer.decode(encoded.input_ids[room:], skip_special_tokens=True)).strip()
    return prompt[encoded.offset_mapping[room][0] :].strip()


@lru_cache(maxsize=1000)  # once for each text: a training draws the same prompts again and again
def warn_of_cut(cut: str, length: int) -> None:
    if cut:
        logger.warning(
            "The text encoder takes %d tokens; this part of the prompt was cut: %r (long_prompts='chunk' keeps it)",
            *(length, cut if len(cut) <= SHOWN else f"{cut[:SHOWN]} ..."),
        )
