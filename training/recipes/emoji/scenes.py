"""Pictures composed of drawings, without end, with captions that say what is where.

    composer = Composer(render_all(read_bundle(path)))
    scene = composer(7)

Scene number `index` is a pure function of the drawings, the seed and the index: any worker can make any scene. A scene
is first planned (which drawings stand where on what background, and what is said of them), then painted. Nothing that
`held_out` names is drawn or said.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import background_colours, layouts, phrases
from .background_colours import Background
from .drawings import SPLITS, Drawing
from .grammar import article
from .held_out import family, pair_held_out
from .layouts import Place
from .things import Thing, Urn, gather, subject

# How often each kind of scene is drawn.
KINDS = {"object": 0.44, "background": 0.12, "pair": 0.2, "three": 0.04, "count": 0.12, "size": 0.05, "sizes": 0.03}
COMMON = 1.4  # power of the frequencies in scenes: they show common things, which a prompt is most likely to combine
COLOURED = 0.12  # of the scenes with several things: on a coloured background
SAME_SET = 0.7  # of the scenes with several things: all from one icon set where it has them
DROWNED = 0.3  # most of a drawing that a background may hide
MIRRORED = ("animals and nature", "food and drink")  # groups whose drawings may be mirrored
WHITE = Background("white", background_colours.WHITE)
INK = 16  # alpha from which a pixel counts as drawn


@dataclass(frozen=True)
class Item:
    """A drawing in its place."""

    drawing: Drawing
    place: Place
    mirrored: bool = False


@dataclass(frozen=True)
class Plan:
    """What a scene will show, from back to front, and what is said of it."""

    kind: str
    items: tuple[Item, ...]
    background: Background
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A picture, (size, size, 3) uint8 RGB, and one to four captions, the plainest first."""

    picture: NDArray[np.uint8]
    captions: tuple[str, ...]
    kind: str


class Composer:
    """Scenes, (size, size), of the drawings of one split, `train` or `validation`.

    Args:
        kinds: how often to draw some kinds of scenes, instead of what `KINDS` says of them.

    Raises:
        ValueError: no such split or kind, or no drawing of the split that could stand in a scene.
    """

    def __init__(
        self,
        drawings: Sequence[Drawing],
        size: int = 128,
        seed: int = 0,
        split: str = "train",
        kinds: Mapping[str, float] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
        self.size, self.seed = size, seed
        self._planner = Planner([drawing for drawing in drawings if drawing.split == split], kinds or {})

    def __call__(self, index: int) -> Scene:
        """Scene number `index`, 0 or more."""
        plan = self.plan(index)
        return Scene(self.paint(plan), plan.captions, plan.kind)

    def plan(self, index: int) -> Plan:
        """What scene number `index` shows and says, before it is painted."""
        if index < 0:
            raise ValueError(f"index is {index}, expected 0 or more")
        return self._planner.plan(random.Random(f"{self.seed} {index}"))

    def paint(self, plan: Plan) -> NDArray[np.uint8]:
        """The plan as pixels: (size, size, 3) uint8."""
        canvas = Image.new("RGB", (self.size, self.size), plan.background.rgb)
        for item in plan.items:
            drawing, corner = placed(item, self.size)
            canvas.paste(drawing, corner, drawing)
        return np.asarray(canvas)


def placed(item: Item, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The item's drawing, cut to its ink and scaled to its place in a picture of `size`, and its left upper corner."""
    rgba = item.drawing.rgba
    ink = rgba[..., 3] > INK
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    cut = Image.fromarray(rgba[top:bottom, left:right])
    if item.mirrored:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    zoom = item.place.side * size / max(cut.size)
    width, height = (max(1, round(side * zoom)) for side in cut.size)
    drawing = cut.resize((width, height), Image.Resampling.BICUBIC)
    return drawing, (round(item.place.x * size - width / 2), round(item.place.y * size - height / 2))


class Planner:
    """Plans scenes of `drawings`; each plan is a pure function of the drawings and the state of `rng`.

    Raises:
        ValueError: no drawing of weight 1 or more, that could stand in a scene; a kind that is not in `KINDS`.
    """

    def __init__(self, drawings: Sequence[Drawing], kinds: Mapping[str, float]) -> None:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ValueError(f"there is no kind of scene {unknown[0]!r}; there are {', '.join(KINDS)}")
        self._kinds = {**KINDS, **kinds}
        things = gather(drawings)
        scenic = [thing for thing in things if thing.own and thing.weight >= 1]
        if not scenic:
            raise ValueError(f"none of {len(drawings)} drawings has weight 1 or more, to stand in a scene")
        self._all, self._scenic = Urn(things), Urn(scenic, COMMON)
        self._countable = Urn([thing for thing in scenic if thing.countable] or scenic, COMMON)
        self._drowned: dict[int, dict[str, float]] = {}
        self._makers: dict[str, Callable[[random.Random], Plan]] = {
            "object": self._object,
            "background": self._background,
            "pair": self._pair,
            "three": self._three,
            "count": self._count,
            "size": self._size,
            "sizes": self._sizes,
        }

    def plan(self, rng: random.Random) -> Plan:
        kind = rng.choices(list(self._kinds), list(self._kinds.values()))[0]
        return self._makers[kind](rng)

    def _object(self, rng: random.Random) -> Plan:
        drawing = self._all.draw(rng).draw(rng, outlines=True)
        captions = phrases.one(rng, subject(drawing))
        return Plan("object", (_item(rng, drawing, layouts.alone(rng)),), WHITE, tuple(captions))

    def _background(self, rng: random.Random) -> Plan:
        drawing = self._scenic.draw(rng).draw(rng, outlines=True)
        captions = phrases.one(rng, subject(drawing), white=False)
        return self._on_colour(rng, "background", [_item(rng, drawing, layouts.alone(rng))], captions)

    def _size(self, rng: random.Random) -> Plan:
        drawing = self._scenic.draw(rng).draw(rng, outlines=True)
        small = rng.random() < 0.6
        word = rng.choice(phrases.SMALL if small else phrases.BIG)
        place = layouts.small(rng) if small else layouts.big(rng)
        captions = phrases.one(rng, subject(drawing), [word])
        return self._maybe_on_colour(rng, "size", [_item(rng, drawing, place)], captions)

    def _count(self, rng: random.Random) -> Plan:
        thing = self._countable.draw(rng)
        number = rng.choices((1, 2, 3, 4), (1, 4, 4, 3))[0]
        drawing = thing.draw(rng)
        same = [other for other in thing.own if other.colour == drawing.colour and other.set_name != drawing.set_name]
        mixed = not drawing.turned and same and rng.random() < 0.25
        drawings = [rng.choice([drawing, *same]) if mixed else drawing for _ in range(number)]
        places = [layouts.alone(rng)] if number == 1 else layouts.several(rng, number)
        mirrored = rng.random() < 0.5
        items = [Item(one, place, _mirrored(one, mirrored)) for one, place in zip(drawings, places, strict=True)]
        captions = phrases.several(rng, subject(drawing, thing.countable), number)
        return self._maybe_on_colour(rng, "count", items, captions)

    def _pair(self, rng: random.Random) -> Plan:
        drawings = self._choose(rng, 2)
        sides = [rng.uniform(0.36, 0.47) for _ in drawings]
        layout, say = rng.choice(
            ((layouts.row, phrases.beside),) * 5
            + ((layouts.column, phrases.above),) * 3
            + ((layouts.diagonal, lambda rng, a, b: phrases.together(rng, [a, b])),)
        )
        items = [_item(rng, *pair) for pair in zip(drawings, layout(rng, sides), strict=True)]
        captions = [say(rng, *self._named(rng, drawings, first=number == 0)) for number in range(3)]
        return self._maybe_on_colour(rng, "pair", items, captions)

    def _three(self, rng: random.Random) -> Plan:
        drawings = self._choose(rng, 3)
        places = layouts.several(rng, 3)
        items = [_item(rng, *pair) for pair in zip(drawings, places, strict=True)]
        captions = [phrases.together(rng, self._named(rng, drawings, first=number == 0)) for number in range(3)]
        return self._maybe_on_colour(rng, "three", items, captions)

    def _sizes(self, rng: random.Random) -> Plan:
        drawings = self._choose(rng, 2)
        sides = [rng.uniform(0.56, 0.66), rng.uniform(0.2, 0.27)]
        words = [[rng.choice(phrases.BIG)], [rng.choice(phrases.SMALL)]]
        if rng.random() < 0.5:
            sides, words = sides[::-1], words[::-1]
        items = [_item(rng, *pair) for pair in zip(drawings, layouts.row(rng, sides), strict=True)]
        captions = []
        for number in range(3):
            names = [
                article(phrases.noun(rng, subject(one), word, rng.random() < 0.4, number == 0))
                for one, word in zip(drawings, words, strict=True)
            ]
            captions.append(phrases.beside(rng, *names))
        return self._maybe_on_colour(rng, "sizes", items, captions)

    def _named(self, rng: random.Random, drawings: Sequence[Drawing], first: bool) -> list[str]:
        colour = not first and rng.random() < 0.5
        return [article(phrases.noun(rng, subject(one), (), colour, first)) for one in drawings]

    def _choose(self, rng: random.Random, number: int) -> list[Drawing]:
        """Drawings of different families, no two of them held out together."""
        found: list[Drawing] = []
        set_name: str | None = None
        for _ in range(200):
            thing = self._scenic.draw(rng)
            if any(_never_together(thing, other) for other in found):
                continue
            found.append(thing.draw(rng, set_name=set_name))
            if len(found) == number:
                return found
            if rng.random() < SAME_SET:
                set_name = found[0].set_name
        raise ValueError(f"found no {number} things that may stand together; more things are needed")

    def _maybe_on_colour(self, rng: random.Random, kind: str, items: Sequence[Item], captions: Sequence[str]) -> Plan:
        if rng.random() < COLOURED and not any("background" in text or "on white" in text for text in captions):
            return self._on_colour(rng, kind, items, captions)
        return Plan(kind, tuple(items), WHITE, tuple(dict.fromkeys(captions)))

    def _on_colour(self, rng: random.Random, kind: str, items: Sequence[Item], captions: Sequence[str]) -> Plan:
        """On a background that hides none of the drawings; on white, and saying so, where every colour would."""
        hidden = {
            name
            for item in items
            for name, share in self._hidden(item.drawing).items()
            if share > DROWNED or name.split()[-1] == item.drawing.colour
        }
        plain = len(hidden) == len(background_colours.SHADES)
        background = WHITE if plain else background_colours.choose(rng, sorted(hidden))
        said = phrases.on_background(rng, captions, background.name)
        return Plan(kind, tuple(items), background, tuple(said))

    def _hidden(self, drawing: Drawing) -> dict[str, float]:
        key = id(drawing)
        if key not in self._drowned:
            self._drowned[key] = background_colours.drowned(drawing.rgba)
        return self._drowned[key]


def _never_together(thing: Thing, other: Drawing) -> bool:
    one, two = thing.concept.hexcode, other.concept.hexcode
    return family(one) == family(two) or pair_held_out(one, two)


def _item(rng: random.Random, drawing: Drawing, place: Place) -> Item:
    return Item(drawing, place, _mirrored(drawing, rng.random() < 0.5))


def _mirrored(drawing: Drawing, wanted: bool) -> bool:
    return wanted and drawing.group in MIRRORED
