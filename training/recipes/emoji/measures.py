"""Judges pictures by the facts of their prompts, and sums up: shares with their standard errors."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from . import ink as inks
from .ink import Ink
from .judge import Judge
from .prompts import Asked, Kind, Prompt, Size, Where

View = tuple[Image.Image | None, ...]  # where to look for each thing of a prompt; None where nothing is drawn

NEVER = 10**6  # the rank of a thing that is not there


@dataclass(frozen=True)
class Marks:
    """What is right of one picture; None where its prompt says nothing of it.

    `rank`: how many guesses the judge needs until the thing, or the last of all things, is found where it must be.
    `seen`: its first guess of the first thing, a hexcode.
    """

    prompt: Prompt
    rank: int
    seen: str | None
    colour: bool | None = None
    mostly: bool | None = None
    background: bool | None = None
    count: bool | None = None
    size: bool | None = None
    style: bool | None = None


@dataclass(frozen=True)
class Figure:
    """A share, or another mean, with its standard error and the number of pictures it is of."""

    value: float
    error: float
    count: int

    def over(self, other: "Figure") -> "Figure | None":
        """The ratio of two independent figures (delta method); None over 0."""
        if not other.value:
            return None
        error = math.hypot(self.error / other.value, self.value * other.error / other.value**2)
        return Figure(self.value / other.value, error, self.count)


@dataclass(frozen=True)
class Measure:
    """`name` in files, `title` in tables; `right` says of a picture of the kind whether it is, or None if unknown."""

    name: str
    title: str
    kind: Kind
    right: Callable[[Marks], bool | None]

    def of(self, marks: Iterable[Marks]) -> Figure | None:
        """None where no picture tells."""
        told = [self.right(one) for one in marks if one.prompt.kind == self.kind]
        known = [right for right in told if right is not None]
        return share(known) if known else None


def share(right: Sequence[bool]) -> Figure:
    """With a standard error that is not 0 for none or all of a few: two right and two wrong are added for it.

    (Agresti and Coull 1998; the share itself is left as it is.) There must be one answer at least.
    """
    count = len(right) + 4
    adjusted = (sum(right) + 2) / count
    return Figure(sum(right) / len(right), math.sqrt(adjusted * (1 - adjusted) / count), len(right))


def first(marks: Marks) -> bool:
    return marks.rank <= 1


def within_five(marks: Marks) -> bool:
    return marks.rank <= 5


def both(one: bool | None, two: bool | None) -> bool | None:
    return None if one is None or two is None else one and two


MEASURES = (
    Measure("objects_first", "objects, first guess", Kind.OBJECTS, first),
    Measure("objects_five", "objects, within five", Kind.OBJECTS, within_five),
    Measure("colours", "colours", Kind.COLOURS, lambda m: m.colour),
    Measure("colours_mostly", "colours, the largest vivid share", Kind.COLOURS, lambda m: m.mostly),
    Measure("colours_object", "coloured things, within five", Kind.COLOURS, within_five),
    Measure("colours_both", "colour and thing", Kind.COLOURS, lambda m: both(m.colour, within_five(m))),
    Measure("backgrounds", "colours of backgrounds", Kind.BACKGROUNDS, lambda m: m.background),
    Measure("backgrounds_object", "things on backgrounds, within five", Kind.BACKGROUNDS, within_five),
    Measure("scenes_first", "both things of scenes, first guess", Kind.SCENES, first),
    Measure("scenes_five", "both things of scenes, within five", Kind.SCENES, within_five),
    Measure("counts", "counts, two to four", Kind.COUNTS, lambda m: m.count),
    Measure("counts_object", "count and thing", Kind.COUNTS, lambda m: both(m.count, within_five(m))),
    Measure("small", "small things", Kind.SIZES, lambda m: m.size if m.prompt.size == Size.SMALL else None),
    Measure("big", "big things", Kind.SIZES, lambda m: m.size if m.prompt.size == Size.BIG else None),
    Measure("styles", "styles", Kind.STYLES, lambda m: m.style),
    Measure("synonyms_first", "synonyms, first guess", Kind.SYNONYMS, first),
    Measure("synonyms_five", "synonyms, within five", Kind.SYNONYMS, within_five),
)


def synonyms_and_known(marks: Sequence[Marks]) -> tuple[list[Marks], list[Marks]]:
    """The pictures of synonyms and, for each, that of the word that training used; both only where both are there."""
    objects = {one.prompt.text: one for one in marks if one.prompt.kind == Kind.OBJECTS}
    pairs = [(one, objects[one.prompt.known]) for one in marks if one.prompt.known in objects]
    return [one for one, _ in pairs], [known for _, known in pairs]


def known_words(marks: Sequence[Marks]) -> Figure | None:
    """The share of the synonyms' known words found within five guesses; each counts as often as it has synonyms."""
    known = synonyms_and_known(marks)[1]
    return share([within_five(one) for one in known]) if known else None


def synonym_ratio(marks: Sequence[Marks]) -> Figure | None:
    """How much of what the known words get within five guesses the synonyms get."""
    parts = synonyms_and_known(marks)
    if not parts[0]:
        return None
    unseen, known = (share([within_five(one) for one in part]) for part in parts)
    return unseen.over(known)


def mark(judge: Judge, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]) -> list[Marks]:
    """The marks of each picture by its prompt.

    Raises:
        ValueError: not one picture for each prompt, or a thing that the judge knows by none of its names.
    """
    if len(prompts) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures cannot be judged by {len(prompts)} prompts")
    unknown = [prompt.text for prompt in prompts if not knows(judge, prompt)]
    if unknown:
        raise ValueError(f"the judge does not know the things of {len(unknown)} prompts, such as {unknown[0]!r}")
    found = [inks.find_ink(picture) for picture in pictures]
    views = [views_of(prompt, ink) for prompt, ink in zip(prompts, found, strict=True)]
    crops = [crop for ways in views for way in ways for crop in way if crop is not None]
    opinions: Iterator[Tensor] = iter(judge.look(crops)[0] if crops else ())
    marks = []
    for prompt, ink, ways in zip(prompts, found, views, strict=True):
        looks = [[None if crop is None else next(opinions) for crop in way] for way in ways]
        marks.append(marks_of(judge, prompt, ink, looks))
    return marks


def knows(judge: Judge, prompt: Prompt) -> bool:
    """Whether the judge has a class for each thing of a prompt."""
    return all(not set(asked.answers).isdisjoint(judge.classes) for asked in prompt.things)


def views_of(prompt: Prompt, ink: Ink) -> list[View]:
    """The ways in which a picture may show the things of its prompt; one of them must be right."""
    if prompt.count is not None:
        counted = inks.count_pieces(ink)
        return [(inks.crop(ink.part(counted[0])) if counted else None,)]
    where = prompt.things[0].where
    if where == Where.ALONE:
        return [(inks.crop(ink),)]
    row, column = ([inks.crop(half) for half in inks.halves(ink, across)] for across in (True, False))
    ways = {
        Where.LEFT: [row],
        Where.TOP: [column],
        Where.BESIDE: [row, row[::-1]],
        Where.ANYWHERE: [row, row[::-1], column, column[::-1]],
    }
    return [tuple(way) for way in ways[where]]


def marks_of(judge: Judge, prompt: Prompt, ink: Ink, looks: Sequence[Sequence[Tensor | None]]) -> Marks:
    """`looks`: for each way, the judge's log-probabilities (K,) of each thing's crop."""
    ranks = [
        max(rank_of(judge, asked, opinion) for asked, opinion in zip(prompt.things, way, strict=True)) for way in looks
    ]
    shown = looks[0][0]
    marks = Marks(
        prompt,
        rank=min(ranks),
        seen=None if shown is None else judge.classes[int(shown.argmax())],
        colour=None if prompt.colour is None else inks.main_colour(ink) == prompt.colour,
        mostly=None if prompt.colour is None else inks.has_most(ink, prompt.colour),
        background=None if prompt.background is None else inks.ground_colour(ink) == prompt.background,
        count=None if prompt.count is None else len(inks.count_pieces(ink)) == prompt.count,
        size=None if prompt.size is None else is_sized(ink, prompt.size),
        style=None if prompt.style is None else inks.looks(ink) == prompt.style,
    )
    return marks


def rank_of(judge: Judge, asked: Asked, opinion: Tensor | None) -> int:
    """How many guesses are needed: 1 and the number of wrong classes that seem likelier than every right one."""
    if opinion is None:
        return NEVER
    right = [judge.index[hexcode] for hexcode in asked.answers if hexcode in judge.index]
    return 1 + int((opinion > opinion[right].max()).sum())


def is_sized(ink: Ink, size: Size) -> bool:
    side = inks.longer_side(ink)
    return 0 < side <= inks.SMALL if size == Size.SMALL else side >= inks.BIG
