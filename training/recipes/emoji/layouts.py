"""Where the things of a scene stand: centres and sides in fractions of the picture, x to the right and y down."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.03


@dataclass(frozen=True)
class Place:
    """A square that a thing fills with its longer side: its centre and its side."""

    x: float
    y: float
    side: float


def alone(rng: random.Random) -> Place:
    """One thing, large and near the centre."""
    side = rng.uniform(0.74, 0.93)
    stray = (1 - side) / 2 - MARGIN / 2
    return Place(0.5 + rng.uniform(-stray, stray) * 0.6, 0.5 + rng.uniform(-stray, stray) * 0.6, side)


def small(rng: random.Random) -> Place:
    """One small thing, in the middle half of the time."""
    side = rng.uniform(0.24, 0.38)
    reach = 0.04 if rng.random() < 0.5 else 0.5 - side / 2 - MARGIN
    return Place(0.5 + rng.uniform(-reach, reach), 0.5 + rng.uniform(-reach, reach), side)


def big(rng: random.Random) -> Place:
    """One thing that fills the picture."""
    return Place(0.5 + rng.uniform(-0.01, 0.01), 0.5 + rng.uniform(-0.01, 0.01), rng.uniform(0.95, 1.0))


def row(rng: random.Random, sides: Sequence[float]) -> list[Place]:
    """Left to right, on one line or with their feet on one line."""
    room = 1 - 2 * MARGIN
    gap = rng.uniform(0.02, 0.07)
    shrink = min(1.0, (room - gap * (len(sides) - 1)) / sum(sides))
    widths = [side * shrink for side in sides]
    left = MARGIN + (room - sum(widths) - gap * (len(sides) - 1)) * rng.uniform(0.3, 0.7)
    feet = rng.random() < 0.5
    ground = 0.5 + max(widths) / 2 + rng.uniform(-0.12, 0.12) * (1 - max(widths))
    places = []
    for width in widths:
        y = ground - width / 2 if feet else ground - max(widths) / 2 + rng.uniform(-0.03, 0.03)
        places.append(Place(left + width / 2, min(max(y, width / 2), 1 - width / 2), width))
        left += width + gap
    return places


def column(rng: random.Random, sides: Sequence[float]) -> list[Place]:
    """Top to bottom."""
    return [Place(place.y, place.x, place.side) for place in row(rng, sides)]


def diagonal(rng: random.Random, sides: Sequence[float]) -> list[Place]:
    """Two things in opposite corners."""
    places = row(rng, sides)
    lift = rng.uniform(0.16, 0.26) * rng.choice((-1, 1))
    moved = [(place, 0.5 + lift * (1 if number == 0 else -1)) for number, place in enumerate(places)]
    return [Place(place.x, min(max(y, place.side / 2), 1 - place.side / 2), place.side) for place, y in moved]


def triangle(rng: random.Random, side: float) -> list[Place]:
    """Two beside each other, the third above or below them in the middle."""
    apart = side / 2 + rng.uniform(0.01, max(0.012, 0.48 - side))
    up = rng.choice((-1, 1)) * (side / 2 + rng.uniform(0.005, 0.03))
    corners = [(0.5 - apart, 0.5 + up), (0.5 + apart, 0.5 + up), (0.5 + rng.uniform(-0.05, 0.05), 0.5 - up)]
    return [_inside(x, y, side) for x, y in corners]


def square(rng: random.Random, side: float) -> list[Place]:
    """Two by two."""
    apart = side / 2 + rng.uniform(0.012, max(0.014, 0.47 - side))
    corners = [(-1, -1), (1, -1), (-1, 1), (1, 1)]
    return [_inside(0.5 + x * apart + rng.uniform(-0.01, 0.01), 0.5 + y * apart, side) for x, y in corners]


def several(rng: random.Random, number: int) -> list[Place]:
    """Two to four things of about one size, laid out in one of several ways."""
    if number == 2:
        layout = rng.choice((row, row, column, diagonal))
        side = rng.uniform(0.34, 0.46)
        return layout(rng, [side, side])
    if number == 3:
        if rng.random() < 0.55:
            return triangle(rng, rng.uniform(0.34, 0.44))
        return rng.choice((row, row, column))(rng, [rng.uniform(0.24, 0.3)] * 3)
    if rng.random() < 0.75:
        return square(rng, rng.uniform(0.32, 0.44))
    return rng.choice((row, row, column))(rng, [rng.uniform(0.19, 0.22)] * 4)


def _inside(x: float, y: float, side: float) -> Place:
    half = side / 2
    return Place(min(max(x, half), 1 - half), min(max(y, half), 1 - half), side)
