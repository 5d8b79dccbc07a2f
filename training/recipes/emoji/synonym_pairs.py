"""Words that no caption uses, and pairs of captions that say the same: one with such a word, one as training says it.

`synonyms.txt` has the words. The words that `concepts.txt` marks with `?` are held out here too, with their forms.
"""

import hashlib
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from . import phrases
from .captions import Concept, read_concepts
from .colour import COLOURS
from .grammar import article, coloured, described, plural, says_colour
from .held_out import base_colour, colour_held_out, pair_held_out
from .phrases import Subject

Synonyms = dict[str, tuple[str, ...]]
Pair = tuple[str, str]  # captions: what is read, what it means

VALIDATION = 0.08  # of the words, kept apart to see what the encoder makes of words that it was not taught
GROUNDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "gray", "light blue", "dark blue")
# Words before and around a thing that change nothing of its picture; a caption with them means the one without.
PRAISE = (
    *("cute", "beautiful", "nice", "lovely", "pretty", "simple", "funny", "cool", "great", "little cute", "modern"),
    *("colourful", "colorful", "typical", "ordinary", "common", "single", "new", "old", "fancy", "adorable", "perfect"),
    *("good", "friendly", "classic", "standard", "normal", "wonderful", "amazing", "clean", "good quality", "detailed"),
)
AROUND = (
    *("the {bare}", "my {bare}", "one {bare}", "a photo of {one}", "an image of {one}", "draw {one}", "show me {one}"),
    *("just {one}", "{one} please", "i want {one}", "a sticker of {one}", "the emoji {bare}", "{one}, high quality"),
)


@dataclass(frozen=True)
class Swap:
    """`word` is to be read as `name`, which captions use; a leading `~` means no article."""

    word: str
    name: str


def read_synonyms(known: Collection[str], unseen: Iterable[str], path: Path | None = None) -> Synonyms:
    """The words of a `synonyms.txt` (this recipe's own by default), by the name or the colour that captions use.

    Args:
        known: names of things that captions use, without `~`.
        unseen: the words that are held out.

    Raises:
        ValueError: a line that is no entry, names what no caption says, or has a held-out word; with file and line.
    """
    path = path or Path(__file__).with_name("synonyms.txt")
    forbidden = list(unseen)
    found: Synonyms = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, words = (part.strip() for part in line.partition(":"))
        others = tuple(word.strip() for word in words.split(","))
        where = f"{path.name}, line {number}"
        if not colon or "" in others:
            raise ValueError(f"{where}: expected 'NAME: WORD, WORD, ...', got {line!r}")
        if name not in known and base_colour(name) not in COLOURS:
            raise ValueError(f"{where}: no caption uses {name!r}; name a thing as concepts.txt does, or a colour")
        for word in others:
            if held := next((held for held in forbidden if is_form(word, held)), None):
                raise ValueError(f"{where}: {word!r} is {held!r}, which is held out; take it away")
        found[name] = (*found.get(name, ()), *others)
    return found


def with_synonyms(concepts: Iterable[Concept]) -> dict[str, Concept]:
    """By hexcode, the concepts with the words of `synonyms.txt` as further names, but for those that are kept apart.

    Whoever learns from many words for one thing reads the sentence encoder's meaning, not the states of one name.
    """
    concepts, common = list(concepts), read_concepts().values()
    known = {name.removeprefix("~") for concept in (*common, *concepts) for name in concept.names}
    synonyms = read_synonyms(known, [name for concept in common for name in concept.unseen])
    found = {}
    for concept in concepts:
        words = [word for name in concept.names for word in synonyms.get(name.removeprefix("~"), ())]
        fit = [word for word in words if not is_validation(word) and not says_colour(word.removeprefix("~"))]
        found[concept.hexcode] = replace(concept, names=tuple(dict.fromkeys((*concept.names, *fit))))
    return found


def is_form(word: str, held: str) -> bool:
    """Whether a word is, contains or begins with a held-out one, in the singular or plural, however it is spelled."""
    forms, core = _forms(held)
    words = word.removeprefix("~").lower()
    squeezed = re.sub(r"[^a-z]", "", words)
    if squeezed == core or forms.search(words):
        return True
    return len(core) > 4 and any(part.startswith(core) for part in (*re.findall(r"[a-z]+", words), squeezed))


@lru_cache(maxsize=1024)
def _forms(held: str) -> tuple[re.Pattern[str], str]:
    """What finds the held-out word and its plural or singular, and its letters alone."""
    bare = held.removeprefix("~").lower()
    forms = {bare, bare.removesuffix("s")} | (set() if held.startswith("~") else {plural(bare)})
    return re.compile("|".join(rf"\b{re.escape(form)}\b" for form in forms)), re.sub(r"[^a-z]", "", bare)


def is_validation(word: str) -> bool:
    """Whether a word is kept apart; the same on every machine."""
    return int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) < VALIDATION * 2**32


class Pairs:
    """Pairs of captions, (what is read, what it means); all that captions of the recipe say, by its own phrases.

    Nothing that `held_out` keeps from the training is said.

    Args:
        swaps: words with the names that they stand for.
        colours: words for colours, by the colours that captions say.
        concepts: what the names mean, by name as captions write them (with `~`).
    """

    def __init__(
        self, swaps: Sequence[Swap], colours: Mapping[str, Sequence[str]], concepts: Mapping[str, Concept]
    ) -> None:
        self.swaps, self.concepts = list(swaps), dict(concepts)
        self.tints = [(word, colour) for colour, words in colours.items() for word in words]
        self.names = list(concepts)
        self.often = [max(concept.weight, 0.5) for concept in concepts.values()]

    def word(self, rng: random.Random, swap: Swap | None = None) -> Pair:
        """A caption with a word of `swaps`, and the same with the name."""
        swap = swap or rng.choice(self.swaps)
        say = self.caption(rng, swap.name)
        return say(swap.word), say(swap.name)

    def same(self, rng: random.Random) -> Pair:
        """A caption that training knows, twice."""
        name = self.known(rng)
        say = self.caption(rng, name)
        return say(name), say(name)

    def tint(self, rng: random.Random) -> Pair:
        """A caption with another word for a colour, and the same with the colour's name."""
        word, colour = rng.choice(self.tints)
        name = self.known(rng, lambda concept: not colour_held_out(colour, concept.hexcode))
        if says_colour(name):
            return self.same(rng)
        seed, ground = rng.random(), rng.random() < 0.3

        def say(tint: str) -> str:
            again = random.Random(seed)
            if ground:
                return phrases.on_background(again, [article(name)], tint)[0]
            return again.choice(["{}", "{}", "an emoji of {}"]).format(article(described(name, [tint])))

        return say(word), say(colour)

    def praise(self, rng: random.Random) -> Pair:
        """A caption with words that change nothing, and the same without."""
        name = self.known(rng)
        plain, way = article(name), rng.random()
        if way < 0.5:
            return article(described(name, [rng.choice(PRAISE)])), plain
        return rng.choice(AROUND).format(one=plain, bare=name.removeprefix("~")), plain

    def known(self, rng: random.Random, fits: Callable[[Concept], bool] = lambda concept: True) -> str:
        """One of the names, by the weights of their concepts."""
        while True:
            name = rng.choices(self.names, self.often)[0]
            if fits(self.concepts[name]):
                return name

    def caption(self, rng: random.Random, name: str) -> Callable[[str], str]:
        """One way to say a thing, as a function of its word: alone, in colour, on a background, counted, in a pair."""
        seed, kind = rng.random(), rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        concept = self.concepts[name]
        wanted = rng.choice(COLOURS[:-1]) if concept.flag == "t" and rng.random() < 0.35 else None
        colour = None if wanted is None or says_colour(name) or colour_held_out(wanted, concept.hexcode) else wanted
        other = self.known(rng, lambda one: not pair_held_out(one.hexcode, concept.hexcode))
        style = rng.choice(list(phrases.STYLES))
        return partial(_say, kind, seed, colour, style, other)


def _say(
    kind: Callable[[random.Random, Subject, str], Sequence[str]],
    seed: float,
    colour: str | None,
    style: str,
    other: str,
    word: str,
) -> str:
    rng = random.Random(seed)
    number = rng.randrange(4)
    said = kind(rng, Subject((word,), colour, style), other)
    return said[min(number, len(said) - 1)]


def _single(rng: random.Random, subject: Subject, other: str) -> Sequence[str]:
    return phrases.one(rng, subject)


def _styled(rng: random.Random, subject: Subject, other: str) -> Sequence[str]:
    style, name = phrases.STYLES[subject.style], phrases.noun(rng, subject)
    said = [f"{article(name)}, {rng.choice(style.after)}", article(described(name, [rng.choice(style.before)]))]
    return [*said, *(around.format(article(name)) for around in style.around), said[0]]


def _ground(rng: random.Random, subject: Subject, other: str) -> Sequence[str]:
    ground = rng.choice(GROUNDS)
    return phrases.on_background(rng, phrases.one(rng, subject, white=False), ground)


def _sized(rng: random.Random, subject: Subject, other: str) -> Sequence[str]:
    word = rng.choice(phrases.SMALL + phrases.BIG)
    return phrases.one(rng, subject, [word])


def _several(rng: random.Random, subject: Subject, other: str) -> Sequence[str]:
    number = rng.choice((2, 3, 4))
    return phrases.one(rng, subject) if subject.names[0].startswith("~") else phrases.several(rng, subject, number)


def _pair(rng: random.Random, subject: Subject, other: str) -> Sequence[str]:
    name = subject.names[0]
    mine = article((subject.colour and coloured(name, subject.colour)) or name)
    ways = (phrases.beside, phrases.above, lambda rng, a, b: phrases.together(rng, [a, b]))
    say = rng.choices(ways, (5, 3, 1))[0]
    both = (mine, article(other)) if rng.random() < 0.5 else (article(other), mine)
    return [say(rng, *both)]


_KINDS = {_single: 44, _styled: 16, _ground: 11, _sized: 5, _several: 10, _pair: 14}  # how often each is said
