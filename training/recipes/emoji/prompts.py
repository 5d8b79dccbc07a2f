"""What a model is asked for to be judged: held-out prompts, each with the facts that its picture must show.

Colours of things, pairs of things and synonyms are those that `held_out` keeps out of every training caption; names of
single things are known, their pictures are drawn from noise. The list depends on `concepts.txt` alone.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from .captions import Concept, read_concepts
from .colour import TARGETS
from .grammar import article, coloured, counted, described, says_colour
from .held_out import PORTRAIT, colour_held_out, family, pair_held_out, uncoloured

T = TypeVar("T")

COMMON, BEST = 2.0, 3.0  # weights of concepts
STYLES = ("flat", "glossy", "outline")
GROUNDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "gray")
# Things in one piece, with nothing around them that could be counted.
COUNTED = (
    *("apple", "lemon", "strawberry", "tomato", "car", "bus", "house", "tree", "cactus", "star", "heart", "balloon"),
    *(
        "ball",
        "soccer ball",
        "fish",
        "bird",
        "owl",
        "cat",
        "dog",
        "elephant",
        "key",
        "bell",
        "hat",
        "mushroom",
        "donut",
    ),
)


class Kind(StrEnum):
    OBJECTS = "objects"
    COLOURS = "colours"
    BACKGROUNDS = "backgrounds"
    SCENES = "scenes"
    COUNTS = "counts"
    SIZES = "sizes"
    STYLES = "styles"
    SYNONYMS = "synonyms"


class Where(StrEnum):
    """Where in the picture a thing must be found; `BESIDE` things are two in a row, whichever is first."""

    ALONE = "alone"
    LEFT = "left"
    RIGHT = "right"
    TOP = "top"
    BOTTOM = "bottom"
    BESIDE = "beside"
    ANYWHERE = "anywhere"


class Size(StrEnum):
    SMALL = "small"
    BIG = "big"


@dataclass(frozen=True)
class Asked:
    """A thing that is asked for: its hexcode, the hexcodes that answer as well, and where it must be."""

    hexcode: str
    answers: tuple[str, ...]
    where: Where = Where.ALONE


@dataclass(frozen=True)
class Prompt:
    """A prompt and the facts to check; None where nothing is said.

    `known`, of a synonym: the text of the `objects` prompt for the same thing by a name that training used.
    """

    kind: Kind
    text: str
    things: tuple[Asked, ...]
    colour: str | None = None
    background: str | None = None
    count: int | None = None
    size: Size | None = None
    style: str | None = None
    known: str | None = None


def held_out_prompts(concepts: Mapping[str, Concept] | None = None) -> list[Prompt]:
    """All prompts, by kind; of the recipe's own concepts unless others are given."""
    book = Book(concepts if concepts is not None else read_concepts())
    makers: Sequence[Callable[[], Iterable[Prompt]]] = (
        book.objects,
        book.colours,
        book.backgrounds,
        book.scenes,
        book.counts,
        book.sizes,
        book.styles,
        book.synonyms,
    )
    return [prompt for make in makers for prompt in make()]


class Book:
    """Makes the prompts of each kind from `concepts`."""

    def __init__(self, concepts: Mapping[str, Concept]) -> None:
        self.concepts = concepts
        self.common = [concept for concept in concepts.values() if concept.weight >= COMMON]
        self.plain = [concept for concept in self.common if is_plain(concept.names[0])]
        self.best = [concept for concept in self.plain if concept.weight >= BEST] or self.plain
        self.spellings: dict[str, list[str]] = {}
        for concept in concepts.values():
            for name in {bare(name) for name in (*concept.names, *concept.unseen)}:
                self.spellings.setdefault(name, []).append(concept.hexcode)

    def asked(self, concept: Concept, name: str | None = None, where: Where = Where.ALONE) -> Asked:
        """`concept` called `name`: whatever else has that name, in any colour or as a face, is right as well."""
        others = self.spellings[bare(name or concept.names[0])]
        return Asked(concept.hexcode, tuple(dict.fromkeys([concept.hexcode, *others])), where)

    def objects(self) -> Iterator[Prompt]:
        seen: set[str] = set()
        for concept in self.common:
            text = article(concept.names[0])
            if text not in seen:
                seen.add(text)
                yield Prompt(Kind.OBJECTS, text, (self.asked(concept),))

    def colours(self, most: int = 90) -> Iterator[Prompt]:
        pairs = [
            (concept, colour)
            for concept in self.plain
            for colour in TARGETS
            if concept.flag == "t" and colour_held_out(colour, concept.hexcode)
        ]
        for concept, colour in shuffled(pairs, key=lambda pair: f"{pair[0].hexcode} {pair[1]}")[:most]:
            if name := coloured(concept.names[0], colour):
                yield Prompt(Kind.COLOURS, article(name), (self.asked(concept),), colour=colour)

    def backgrounds(self, count: int = 54) -> Iterator[Prompt]:
        things = shuffled(self.best, key=lambda concept: f"ground {concept.hexcode}")
        for number, concept in enumerate(cycled(things, count)):
            ground = GROUNDS[number % len(GROUNDS)]
            if any(ground in name.split() for name in concept.names):  # a red apple is not seen on red
                continue
            text = f"{article(concept.names[0])} on {article(f'{ground} background')}"
            yield Prompt(Kind.BACKGROUNDS, text, (self.asked(concept),), background=ground)

    def scenes(self, each: int = 20) -> Iterator[Prompt]:
        wordings = (
            ("{} next to {}", Where.BESIDE, Where.BESIDE),
            ("{} above {}", Where.TOP, Where.BOTTOM),
            ("{} and {}", Where.ANYWHERE, Where.ANYWHERE),
            ("{} to the left of {}", Where.LEFT, Where.RIGHT),
        )
        pairs = self.pairs(each * len(wordings))
        for number, (one, two) in enumerate(pairs):
            wording, first, second = wordings[number % len(wordings)]
            text = wording.format(article(one.names[0]), article(two.names[0]))
            yield Prompt(Kind.SCENES, text, (self.asked(one, where=first), self.asked(two, where=second)))

    def pairs(self, most: int, often: int = 3) -> list[tuple[Concept, Concept]]:
        """Held-out pairs of the best known things, none of which is in more than `often` pairs."""
        candidates = [
            (one, two)
            for one in self.best
            for two in self.best
            if one.hexcode != two.hexcode and pair_held_out(one.hexcode, two.hexcode)
        ]
        used: Counter[str] = Counter()
        found: list[tuple[Concept, Concept]] = []
        for pair in shuffled(candidates, key=lambda pair: f"{pair[0].hexcode} {pair[1].hexcode}"):
            families = [family(concept.hexcode) for concept in pair]
            if len(found) < most and all(used[name] < often for name in families):
                used.update(families)
                found.append(pair)
        return found

    def counts(self) -> Iterator[Prompt]:
        countable = [concept for concept in self.plain if concept.names[0] in COUNTED]
        for concept in countable:
            for number in (2, 3, 4):
                text = counted(concept.names[0], number)
                yield Prompt(Kind.COUNTS, text, (self.asked(concept),), count=number)

    def sizes(self, count: int = 40) -> Iterator[Prompt]:
        things = shuffled(self.best, key=lambda concept: f"size {concept.hexcode}")
        for number, concept in enumerate(cycled(things, count)):
            size = tuple(Size)[number % len(Size)]
            text = article(described(concept.names[0], [size]))
            yield Prompt(Kind.SIZES, text, (self.asked(concept),), size=size)

    def styles(self, each: int = 16) -> Iterator[Prompt]:
        things = shuffled(self.best, key=lambda concept: f"style {concept.hexcode}")
        for concept in cycled(things, each):
            for style in STYLES:
                text = f"{article(concept.names[0])}, {style} style"
                yield Prompt(Kind.STYLES, text, (self.asked(concept),), style=style)

    def synonyms(self) -> Iterator[Prompt]:
        for concept in self.common:
            for name in concept.unseen:
                known = article(concept.names[0])
                yield Prompt(Kind.SYNONYMS, article(name), (self.asked(concept, name),), known=known)


def bare(name: str) -> str:
    """A name without its colour, its `~`, and the `face` of a portrait: `black cat` and `cat face` are both `cat`."""
    return PORTRAIT.sub("", uncoloured(name).removeprefix("~")) or name


def is_plain(name: str) -> bool:
    """Whether it is one thing by one short name, that other words can be put before."""
    single = not name.startswith("~") and not any(f" {word} " in f" {name} " for word in ("and", "with", "in", "on"))
    return single and not says_colour(name) and len(name.split()) <= 3


def shuffled(items: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """In an order that looks random and depends on the keys alone, so that new items do not disturb the others."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())


def cycled(items: Sequence[T], count: int) -> list[T]:
    return [items[number % len(items)] for number in range(count)] if items else []
