r"""Prompts to tokens where that is more than a tokenizer's call: with weights, and in chunks for long prompts.

The notation of weights, as in ``a (red:1.3) car, ((shiny)), [old]``, is the one that Stable Diffusion's web pages made
common: ``(text:1.3)`` weighs the text by 1.3, ``(text)`` by 1.1, ``[text]`` by 1/1.1; brackets inside brackets
multiply; ``\(`` and so on stand for the character itself.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdiff.text.words import expand_words, later_tokens

COMMAS = (",", ";", ".", "|")
LETTER = re.compile(r"\S")

STEP = 1.1
LIMIT = 1000.0  # states reach about 30, and half precision 65504

PART = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


class Tokens(NamedTuple):
    """What the encoder is given for B prompts in N chunks, one after the other for each prompt."""

    input_ids: Tensor
    """(BN, L), long."""
    attention_mask: Tensor
    """(BN, L), 1 where there is no padding."""
    weights: Tensor
    """(BN, L), float32; 1 for special tokens and padding."""
    cut: list[str]
    """Of each prompt, what found no place."""


class Content(NamedTuple):
    """The tokens of one prompt, without special ones."""

    text: str
    ids: list[int]
    weights: list[float]
    starts: list[int]
    """Where in the text each token begins, without the space before."""
    breaks: list[int]
    """How good a place each token is to begin a new chunk at: 2 after a comma, 1 at a word, 0 inside one."""


class Frame(NamedTuple):
    """The special tokens around a prompt."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        encoded = tokenizer("a", return_special_tokens_mask=True)
        ids, special = encoded.input_ids, encoded.special_tokens_mask
        first = special.index(0)
        last = len(special) - special[::-1].index(0)
        return cls(ids[:first], ids[last:])

    def room(self, length: int) -> int:
        """How many tokens of the prompt fit between them.

        Raises:
            ValueError: none.
        """
        room = length - len(self.before) - len(self.after)
        if room < 1:
            raise ValueError(f"{length} tokens are too few for a prompt and the tokenizer's special tokens")
        return room


def read_prompt(prompt: str, tokenizer: Any, weights: bool) -> Content:
    """The tokens of a prompt, with their weights if `weights` are to be read."""
    pieces = parse_weights(prompt) if weights else [Piece(prompt, 1.0)]
    pieces = [Piece(expand_words([text], tokenizer)[0], weight) for text, weight in pieces]
    text = "".join(piece.text for piece in pieces)
    of_character = [*(weight for piece, weight in pieces for _ in piece), 1.0]
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"a {type(tokenizer).__name__} does not say where in a prompt its tokens are, so prompt_weights and "
            f"long_prompts='chunk' do not work with it"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    ids = list(encoded.input_ids)
    starts = [after_space(text, start) for start, _ in encoded.offset_mapping]
    later = later_tokens(tokenizer)
    breaks = []
    for i, start in enumerate(starts):
        inside = ids[i] in later or (i > 0 and starts[i - 1] == start)  # a letter may have several tokens
        breaks.append(0 if inside else break_at(text, start))
    return Content(text, ids, [of_character[start] for start in starts], starts, breaks)


def after_space(text: str, start: int) -> int:
    """Where the word of a token begins; to some tokenizers the space before belongs to it."""
    letter = LETTER.search(text, start)
    return letter.start() if letter else start


def break_at(text: str, start: int) -> int:
    """See ``Content.breaks``."""
    before = text[:start].rstrip()
    at_word = start == 0 or len(before) < start
    return 2 if before.endswith(COMMAS) and at_word else int(at_word)


def split_content(content: Content, room: int) -> list[slice]:
    """Where to cut a prompt's tokens so that each part has at most `room`: after a comma, if there is one near the end
    of the part, else between words, else where it has to be.
    """
    parts, start = [], 0
    while len(content.ids) - start > room:
        end = start + room
        near = range(end, start + room - room // 3 - 1, -1)
        commas = [i for i in near if content.breaks[i] == 2]
        words = [i for i in range(end, start, -1) if content.breaks[i]]
        stop = (commas or words or [end])[0]
        parts.append(slice(start, stop))
        start = stop
    return [*parts, slice(start, len(content.ids))]


def count_chunks(prompts: Sequence[str], tokenizer: Any, length: int, weights: bool = False) -> int:
    """How many chunks of `length` tokens the longest of `prompts` needs."""
    room = Frame.of(tokenizer).room(length)
    return max(len(split_content(read_prompt(prompt, tokenizer, weights), room)) for prompt in prompts)


def tokenize(prompts: Sequence[str], tokenizer: Any, length: int, *, weights: bool = False, chunks: int = 1) -> Tokens:
    """`prompts` in `chunks` parts of `length` tokens each, every part with the special tokens of a whole prompt.

    A prompt that fits into one part has the tokens that the tokenizer gives it; what is too long for all is cut.

    Raises:
        ValueError: a bracket has no partner; the tokenizer gives no positions of its tokens, or has no padding.
    """
    frame = Frame.of(tokenizer)
    room, padding = frame.room(length), tokenizer.pad_token_id
    if padding is None:
        raise ValueError(f"the {type(tokenizer).__name__} has no padding token; set tokenizer.pad_token")
    rows: list[tuple[list[int], list[int], list[float]]] = []
    cut = []
    for prompt in prompts:
        content = read_prompt(prompt, tokenizer, weights)
        # One chunk is cut where the tokenizer would cut it
        parts = split_content(content, room) if chunks > 1 else [slice(0, room)]
        kept = parts[:chunks]
        end = kept[-1].stop
        cut.append(content.text[content.starts[end] :] if end < len(content.ids) else "")
        for part in kept + [slice(0, 0)] * (chunks - len(kept)):
            ids = [*frame.before, *content.ids[part], *frame.after]
            own = [1.0] * len(frame.before) + content.weights[part]
            free = length - len(ids)
            rows.append((ids + [padding] * free, [1] * len(ids) + [0] * free, own + [1.0] * (length - len(own))))
    numbers, masks, strengths = zip(*rows, strict=True)
    return Tokens(torch.tensor(numbers), torch.tensor(masks), torch.tensor(strengths), cut)


def weigh(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Text states (B, L, D) with every token's influence times its weight (B, L).

    A state moves along the line from the one that the empty prompt has in its place (1 or B, L, D), as ComfyUI does it:
    at 0 the token is as if not written, at 1 nothing is changed, not a bit. Multiplying the states themselves, with
    their mean restored, is the older way; it also scales what all prompts have in common.
    """
    factor = weights.to(states)[:, :, None]
    return torch.where(factor == 1, states, empty + factor * (states - empty))


# Weights


class Piece(NamedTuple):
    """A stretch of a prompt, and how much it counts; 1 is as usual."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[Piece]:
    """The pieces of a prompt, whose texts together are the prompt without brackets and weights.

    Raises:
        ValueError: a bracket without its partner, and where; a weight beyond 1000.
    """
    pieces: list[Piece] = []
    open_at: list[tuple[str, int, int]] = []  # the bracket, its place in the prompt, how many pieces came before
    place = 0

    def close(bracket: str, weight: float) -> None:
        partner = {")": "(", "]": "["}[bracket]
        if not open_at or open_at[-1][0] != partner:
            raise ValueError(unbalanced(prompt, bracket, place))
        start = open_at.pop()[2]
        pieces[start:] = [Piece(text, own * weight) for text, own in pieces[start:]]

    while place < len(prompt):
        found = PART.match(prompt, place)
        assert found is not None
        part = found.group()
        in_round = bool(open_at) and open_at[-1][0] == "("
        if part in ("(", "["):
            open_at.append((part, place, len(pieces)))
        elif part in (")", "]"):
            close(part, STEP if part == ")" else 1 / STEP)
        elif part[0] == ":" and len(part) > 1 and in_round:
            close(")", float(part[1:-1]))
        elif part[0] == ":" and len(part) > 1:  # a colon and a number outside brackets are text; the bracket is not
            pieces.append(Piece(part[:-1], 1.0))
            place += len(part) - 1
            continue
        else:
            pieces.append(Piece(part[1:] if part[0] == "\\" and len(part) == 2 else part, 1.0))
        place += len(part)
    if open_at:
        raise ValueError(unbalanced(prompt, *open_at[-1][:2]))
    check_sizes(pieces)
    return joined(pieces)


def check_sizes(pieces: list[Piece]) -> None:
    """Raises ValueError for a weight that would make states infinite."""
    for text, weight in pieces:
        if not abs(weight) <= LIMIT:  # nan neither
            raise ValueError(
                f"the weight of {text[:100]!r} is {weight:g}; weights lie between -{LIMIT:g} and {LIMIT:g}"
            )


def without_weights(prompt: str) -> str:
    """What a prompt says, for those that do not read weights."""
    return "".join(piece.text for piece in parse_weights(prompt))


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of the same weight as one."""
    result: list[Piece] = []
    for text, weight in pieces:
        if result and result[-1].weight == weight:
            result[-1] = Piece(result[-1].text + text, weight)
        else:
            result.append(Piece(text, weight))
    return result


def unbalanced(prompt: str, bracket: str, place: int) -> str:
    return (
        f"the {bracket!r} at character {place + 1} of the prompt {prompt!r} has no partner; write \\{bracket} if it is "
        f"meant as text"
    )
