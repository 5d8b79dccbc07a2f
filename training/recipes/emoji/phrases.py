"""What is said of a scene: a few captions each, all of them true, the plainest first."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .grammar import NUMBERS, article, coloured, counted, described, says_colour, uncoloured

SMALL = ("small", "small", "little", "tiny")
BIG = ("big", "big", "large", "huge")


@dataclass(frozen=True)
class StyleWords:
    """How a style is said: before the thing, after it, and around it."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    around: tuple[str, ...] = ()


STYLES = {
    "flat": StyleWords(("flat",), ("flat style", "flat design", "in flat style")),
    "glossy": StyleWords(("glossy", "shiny", "3d"), ("glossy style", "3d style", "in 3d style", "glossy")),
    "outline": StyleWords(
        ("outline",),
        ("outline style", "outline", "line art", "line drawing"),
        ("an outline of {}", "a line drawing of {}", "an outline drawing of {}"),
    ),
    "cartoon": StyleWords(("cartoon",), ("cartoon style", "in cartoon style")),
}
DRAWN = ("a drawing of {}", "an emoji of {}", "a picture of {}", "an icon of {}", "an illustration of {}")


@dataclass(frozen=True)
class Subject:
    """What captions may say of one drawing: names, the colour or None, the style.

    With `tinted` every caption says the colour, with `styled` every caption says the style.
    """

    names: tuple[str, ...]
    colour: str | None
    style: str
    tinted: bool = False
    styled: bool = False


def noun(
    rng: random.Random, subject: Subject, words: Sequence[str] = (), colour: bool = True, first: bool = False
) -> str:
    """A name with words before it: `small red car`; a leading `~` stays. The colour is said only if there is one."""
    names = subject.names
    name = names[0] if first or len(names) == 1 or rng.random() < 0.55 else rng.choice(names[1:])
    if subject.colour and (colour or subject.tinted):
        bare = uncoloured(name) if subject.tinted else name
        name = coloured(bare, subject.colour) or name
    return described(name, words) if words else name


def one(rng: random.Random, subject: Subject, words: Sequence[str] = (), white: bool = True) -> list[str]:
    """A single thing; `words` (a size) stand before it in every caption."""
    shape = rng.choice(STYLES[subject.style].around) if subject.styled else "{}"

    def whole(name: str) -> str:
        return shape.format(article(name))

    found = [whole(noun(rng, subject, words, colour=False, first=True))]
    if subject.colour and not subject.tinted:
        found.append(whole(noun(rng, subject, words, first=rng.random() < 0.7)))
    if not subject.styled:
        found.append(noun(rng, subject, words, colour=rng.random() < 0.4).removeprefix("~"))
    found.append(whole(noun(rng, subject, words, colour=rng.random() < 0.5)))
    found.append(_fuller(rng, subject, words, white))
    return _some([found[0], *rng.sample(found[1:], len(found) - 1)])


def _fuller(rng: random.Random, subject: Subject, words: Sequence[str], white: bool) -> str:
    """One longer caption: style, background, the kind of picture."""
    style = STYLES.get(subject.style)
    front = [*words]
    if style and (subject.styled or rng.random() < 0.35):
        front.append(rng.choice(style.before))
    text = article(noun(rng, subject, front, colour=rng.random() < 0.6))
    if len(front) == len(words) and rng.random() < 0.4:
        text = rng.choice(DRAWN).format(text)
    if white and rng.random() < 0.5:
        text += rng.choice(
            (" on a white background", " on white", ", white background", " on a plain white background")
        )
    elif style and len(front) == len(words):
        text += f", {rng.choice(style.after)}"
    return text


def on_background(rng: random.Random, captions: Sequence[str], background: str) -> list[str]:
    """Each caption with the background said, in the usual words first."""
    place = article(f"{background} background")
    endings = [f"on {place}", f"on {background}", f"with {place}"]
    found = []
    for number, text in enumerate(captions):
        way = 0 if number == 0 else rng.choices(range(5), (5, 3, 1, 2, 1))[0]
        if way < 3:
            found.append(f"{text} {endings[way]}")
        else:
            found.append(f"{text}, {background} background" if way == 3 else f"{background} background, {text}")
    return _some(found)


def several(rng: random.Random, subject: Subject, number: int) -> list[str]:
    """`number` of one thing. All of the subject's names can be counted."""
    plain = counted(noun(rng, subject, colour=False, first=True), number)
    found = [plain]
    if subject.colour and not subject.tinted:
        found.append(counted(noun(rng, subject, first=rng.random() < 0.7), number))
    other = counted(noun(rng, subject, colour=rng.random() < 0.5), number)
    found.append(other)
    way = rng.randrange(5)
    if way == 0:
        found.append(f"{number}{other.removeprefix(NUMBERS[number - 1])}")
    elif way == 1 and number > 1:
        found.append(f"a group of {other}")
    elif way == 2:
        found.append(rng.choice(DRAWN).format(other))
    elif way == 3:
        found.append(f"{other} on a white background")
    return _some(found)


def beside(rng: random.Random, left: str, right: str) -> str:
    """Two things in a row, with their articles; where nothing is said of sides, the first stands on the left.

    Were the sides left to chance, all that a denoiser could know of the noisiest latents is a mixture of both things.
    """
    ways = [f"{left} next to {right}"] * 4 + [f"{left} and {right}"] * 4 + [f"{left} beside {right}"]
    ways += [f"{left} to the left of {right}"] * 2 + [f"{right} to the right of {left}"] * 2
    ways += [f"{left} on the left and {right} on the right", f"{left} left of {right}", f"{left} with {right}"]
    return rng.choice(ways)


def above(rng: random.Random, upper: str, lower: str) -> str:
    """Two things in a column."""
    ways = [f"{upper} above {lower}"] * 5 + [f"{lower} below {upper}"] * 4 + [f"{lower} under {upper}"] * 2
    ways += [f"{upper} over {lower}", f"{upper} at the top and {lower} at the bottom"]
    return rng.choice(ways)


def together(rng: random.Random, things: Sequence[str]) -> str:
    """Two or three things, in the order of their places."""
    if len(things) == 2:
        return f"{things[0]} and {things[1]}"
    comma = "," if rng.random() < 0.3 else ""
    return f"{', '.join(things[:-1])}{comma} and {things[-1]}"


def sayable(names: Sequence[str], colour: str | None) -> str | None:
    """The colour, unless a name says one already."""
    return None if any(says_colour(name.removeprefix("~")) for name in names) else colour


def _some(captions: Sequence[str]) -> list[str]:
    """The first four different ones."""
    return list(dict.fromkeys(text.removeprefix("~") for text in captions))[:4]
