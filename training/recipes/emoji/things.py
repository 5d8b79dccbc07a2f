"""The drawings by thing, and urns to draw things from by their weights."""

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from .captions import Concept
from .drawings import Drawing
from .grammar import uncoloured
from .held_out import colour_held_out
from .phrases import Subject, sayable

TURNED = 0.4  # of the pictures of things that have turned copies
OUTLINE = 0.12  # of the pictures of things that have outlines
FEW = 4  # things with fewer drawings are shown less often, in proportion


@dataclass
class Thing:
    """All drawings of one concept: as they were drawn, outlines, and turned copies by colour."""

    concept: Concept
    group: str
    weight: float
    own: list[Drawing] = field(default_factory=list)
    outlines: list[Drawing] = field(default_factory=list)
    turned: dict[str, list[Drawing]] = field(default_factory=dict)

    @property
    def countable(self) -> tuple[str, ...]:
        """The names that can be counted; empty for what is many already, or a mass."""
        names = self.concept.names
        return () if names[0].startswith("~") else tuple(name for name in names if not name.startswith("~"))

    @property
    def frequency(self) -> float:
        """How often the thing is shown, compared with others."""
        return self.weight * min(1.0, (len(self.own) + len(self.outlines)) / FEW) ** 0.5

    def draw(self, rng: random.Random, outlines: bool = False, set_name: str | None = None) -> Drawing:
        """One of the drawings; from the icon set `set_name` if it has one."""
        choices = self.own or self.outlines
        if outlines and self.outlines and rng.random() < OUTLINE:
            choices = self.outlines
        elif self.turned and rng.random() < TURNED:
            choices = self.turned[rng.choice(list(self.turned))]
        same = [drawing for drawing in choices if drawing.set_name == set_name] if set_name else choices
        return rng.choice(same or choices)


def gather(drawings: Sequence[Drawing]) -> list[Thing]:
    """The things of `drawings`, in the order of their first drawing."""
    things: dict[str, Thing] = {}
    for drawing in drawings:
        thing = things.setdefault(drawing.concept.hexcode, Thing(drawing.concept, drawing.group, drawing.weight))
        if drawing.turned and drawing.colour:
            if not colour_held_out(drawing.colour, drawing.concept.hexcode):
                thing.turned.setdefault(drawing.colour, []).append(drawing)
        else:
            (thing.outlines if drawing.style == "outline" else thing.own).append(drawing)
    return [thing for thing in things.values() if thing.own or thing.outlines]


def subject(drawing: Drawing, names: Sequence[str] = ()) -> Subject:
    """What captions may say of a drawing, called by `names` (by all of its concept's names if empty)."""
    concept = drawing.concept
    names = tuple(names or concept.names)
    if drawing.turned:
        names = tuple(dict.fromkeys(uncoloured(name) for name in names if uncoloured(name).removeprefix("~")))
        return Subject(names, drawing.colour, drawing.style, tinted=True)
    if drawing.style == "outline":
        return Subject(names, None, drawing.style, styled=True)  # black lines are the style, not the thing's colour
    colour = sayable(concept.names, drawing.colour)
    if colour and colour_held_out(colour, concept.hexcode):
        colour = None
    return Subject(names, colour, drawing.style)


class Urn:
    """Things to draw from, in proportion to a power of their frequency. Raises `ValueError` when there is none."""

    def __init__(self, things: Sequence[Thing], power: float = 1.0) -> None:
        if not things:
            raise ValueError("no things to draw from")
        self.things = list(things)
        self._edges = list(accumulate(thing.frequency**power for thing in things))

    def draw(self, rng: random.Random) -> Thing:
        return self.things[bisect(self._edges, rng.random() * self._edges[-1], hi=len(self.things) - 1)]
