"""English around a thing's name: articles, plurals, colours and other words before it.

A name that begins with `~` takes no article and is not counted: plurals and mass nouns (`~grapes`, `~bread`).
"""

import re
from collections.abc import Sequence

from .colour import COLOURS

NUMBERS = ("one", "two", "three", "four")
ODD_PLURALS = {
    "human": "humans",
    "mouse": "mice",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "shrimp": "shrimp",
    "squid": "squid",
    "bison": "bison",
    "aircraft": "aircraft",
    "knife": "knives",
    "loaf": "loaves",
    "leaf": "leaves",
    "wolf": "wolves",
    "calf": "calves",
    "shelf": "shelves",
    "goose": "geese",
    "tooth": "teeth",
    "foot": "feet",
    "ox": "oxen",
    "child": "children",
    "man": "men",
    "woman": "women",
    "person": "people",
    "dice": "dice",
    "cactus": "cacti",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "tornado": "tornadoes",
    "hero": "heroes",
    "police": "police",
}
TAILS = re.compile(r"( (?:of|with|in|on|behind|from|for|to|at|and|over|without|[a-z]+ing) .*)$")
PEOPLE = re.compile(r"^(person|man|woman|monkey)( .*)$")  # `person running`: what follows says what they do


def article(name: str) -> str:
    """`car` to `a car`, `apple` to `an apple`; `~grapes` to `grapes`."""
    if name.startswith("~"):
        return name[1:]
    vowel = (name[0] in "aeiou8" and not re.match(r"(uni|uk|eu|one|use|ufo|ute|uku)", name)) or name.startswith(
        ("hour", "suv", "x-ray")
    )
    return f"{'an' if vowel else 'a'} {name}"


def says_colour(name: str) -> bool:
    """Whether one of the name's words is a colour: `red apple`, `green book`."""
    return any(word in COLOURS for word in name.split())


def uncoloured(name: str) -> str:
    """The name without its colour words: `red apple` to `apple`."""
    words = [word for word in name.removeprefix("~").split() if word not in COLOURS]
    return ("~" if name.startswith("~") else "") + " ".join(words)


def coloured(name: str, colour: str) -> str | None:
    """`car` to `red car`, `~grapes` to `~red grapes`; None where the name says a colour or begins with an article."""
    bare = name.removeprefix("~")
    if says_colour(bare) or bare.startswith(("a ", "an ", "two ")):
        return None
    return described(name, [colour])


def described(name: str, words: Sequence[str]) -> str:
    """`car`, [`small`, `red`] to `small red car`; a leading `~` stays in front."""
    bare = name.removeprefix("~")
    return ("~" if name.startswith("~") else "") + " ".join([*words, bare])


def is_plural(name: str) -> bool:
    """Whether an emoji's label is a plural by its looks."""
    thing = name.split(" with ")[0]
    return (thing.endswith("s") and not thing.endswith(("ss", "us"))) or thing.startswith(("people", "women", "men "))


def plural(name: str) -> str:
    """`car` to `cars`, `slice of pizza` to `slices of pizza`, `fork` to `forks`, `mouse face` to `mouse faces`.

    Raises `ValueError` for a name with `~`: it is a plural already, or nobody counts it.
    """
    if name.startswith("~"):
        raise ValueError(f"{name!r} is not counted")
    head, tail = name, ""
    if found := PEOPLE.match(name):
        head, tail = found.groups()
    elif found := TAILS.search(name):
        head, tail = name[: found.start()], found.group()
    *words, last = head.split(" ")
    *hyphenated, last = re.split(r"(?<=-)", last)
    return " ".join([*words, "".join(hyphenated) + _plural_word(last)]) + tail


def _plural_word(word: str) -> str:
    for singular, several in ODD_PLURALS.items():
        if word == singular or (len(singular) > 2 and word.endswith(singular)):
            return word.removesuffix(singular) + several
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and len(word) > 1 and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def counted(name: str, number: int) -> str:
    """`red apple`, 3 to `three red apples`; `number` is 1 to 4."""
    return f"{NUMBERS[number - 1]} {name if number == 1 else plural(name)}"
