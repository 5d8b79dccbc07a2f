r"""Prompts with weights in them: ``a (red:1.3) car, ((shiny)), [old]``.

The notation is the one that Stable Diffusion's web pages made common: ``(text:1.3)`` weighs the text by 1.3, ``(text)``
by 1.1, ``[text]`` by 1/1.1; brackets inside brackets multiply; ``\(`` and so on stand for the character itself.
"""

import re
from typing import NamedTuple

STEP = 1.1
LIMIT = 1000.0  # states reach about 30, and half precision 65504

PART = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


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
