"""What the training never says, so that it can be asked for afterwards: colours of things, pairs of things, synonyms.

Things that a person would call by one word are one family: `cat` and `black cat`, `dog` and `dog face`. What is held
out is held out of the whole family, whichever synonym a caption uses. The answer depends on the names in
`concepts.txt` alone and is the same on every machine. Held-out synonyms are marked there (`Concept.unseen`).
"""

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache

from .captions import Concept, read_concepts
from .colour import COLOURS
from .grammar import plural, uncoloured

COLOUR_SHARE = 0.12
PAIR_SHARE = 0.10
SHADES = ("light ", "dark ", "pale ", "bright ")
PORTRAIT = re.compile(r" face$|^face of an? | head$")
# What the documentation shows is drawn often and is not held out.
SHOWN = frozenset(
    {
        ("red", "car"),
        ("green", "car"),
        ("blue", "car"),
        ("red", "house"),
        ("yellow", "sun"),
        ("blue", "fish"),
        ("yellow", "banana"),
        ("red", "heart"),
        ("yellow", "star"),
        ("blue", "umbrella"),
        ("red", "strawberry"),
        ("pink", "flower"),
        ("purple", "butterfly"),
        ("green", "tree"),
        ("red", "balloon"),
    }
)


def colour_held_out(colour: str, hexcode: str) -> bool:
    """Whether no training caption says `colour` of the thing `hexcode`; `light blue` is held out with `blue`."""
    base = base_colour(colour)
    name = family(hexcode)
    if (base, name) in _said():
        return False
    return _share(f"colour {base} {name}") < COLOUR_SHARE


def pair_held_out(hexcode_a: str, hexcode_b: str) -> bool:
    """Whether no training scene shows the two things together; the order does not matter."""
    first, second = sorted((family(hexcode_a), family(hexcode_b)))
    return first != second and _share(f"pair {first} {second}") < PAIR_SHARE


def base_colour(colour: str) -> str:
    """`light blue` to `blue`."""
    for shade in SHADES:
        colour = colour.removeprefix(shade)
    return colour


def family(hexcode: str) -> str:
    """What all things of `hexcode`'s family are known by; things without names in `concepts.txt` are their own."""
    return _families().get(hexcode, hexcode)


def families(concepts: Mapping[str, Concept]) -> dict[str, str]:
    """The family of each concept by hexcode: things that share a name or its plural, colours and portraits aside, are
    one family.

    A family is known by the plain first name of its first concept.
    """
    parent = {hexcode: hexcode for hexcode in concepts}

    def root(hexcode: str) -> str:
        while parent[hexcode] != hexcode:
            hexcode = parent[hexcode]
        return hexcode

    owner: dict[str, str] = {}
    for hexcode, concept in concepts.items():
        for name in (*concept.names, *concept.unseen):
            forms = [_bare(name)] if name.startswith("~") else [_bare(name), plural(_bare(name))]
            for form in forms:
                first = owner.setdefault(form, hexcode)
                parent[root(hexcode)] = root(first)
    return {hexcode: _bare(concepts[root(hexcode)].names[0]) for hexcode in concepts}


def _bare(name: str) -> str:
    return PORTRAIT.sub("", uncoloured(name).removeprefix("~"))


@lru_cache(maxsize=1)
def _families() -> dict[str, str]:
    return families(read_concepts())


@lru_cache(maxsize=1)
def _said() -> frozenset[tuple[str, str]]:
    """Colours that a name says already (`green apple`), and those the documentation shows."""
    said = {
        (word, family(concept.hexcode))
        for concept in read_concepts().values()
        for name in concept.names
        for word in name.removeprefix("~").split()
        if word in COLOURS
    }
    return frozenset(said) | SHOWN


@lru_cache(maxsize=65536)
def _share(key: str) -> float:
    """A number in 0..1 that looks random and depends on `key` alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
