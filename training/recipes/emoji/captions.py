"""Captions as a person types them: the bare thing first, then its colour, other words for it, and the style."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .colour import COLOURS
from .grammar import article, coloured, is_plural
from .icons import Emoji, normalise

FLAGS = ("t", "n", "-")
MOST = 10


@dataclass(frozen=True)
class Concept:
    """A common thing: its names (a leading `~` means no article), weight, and flag (see `concepts.txt`).

    `unseen` are further names that no training caption uses; a trained model is asked for them.
    """

    hexcode: str
    weight: float
    flag: str
    names: tuple[str, ...]
    unseen: tuple[str, ...] = ()


def read_concepts(path: Path | None = None) -> dict[str, Concept]:
    """The concepts of a `concepts.txt` (this recipe's own by default) by hexcode; errors name the line."""
    path = path or Path(__file__).with_name("concepts.txt")
    concepts: dict[str, Concept] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split(maxsplit=4)
        if len(parts) != 5 or parts[3] not in FLAGS:
            raise ValueError(f"{path.name}, line {number}: expected 'HEXCODE EMOJI WEIGHT FLAG NAMES', got {line!r}")
        words = [name.strip() for name in parts[4].split(",")]
        names = tuple(name for name in words if not name.startswith("?"))
        unseen = tuple(name[1:] for name in words if name.startswith("?"))
        if not names or "" in (*names, *unseen):
            raise ValueError(f"{path.name}, line {number}: an empty name, or none that captions may use, in {line!r}")
        concept = Concept(normalise(parts[0]), float(parts[2]), parts[3], names, unseen)
        concepts[concept.hexcode] = concept
    return concepts


def without_unseen(concept: Concept, unseen: Iterable[str]) -> Concept | None:
    """The concept without the names that contain one of `unseen` as whole words; None if no name is left."""
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in unseen) or r"(?!)")
    names = tuple(name for name in concept.names if not pattern.search(name))
    return replace(concept, names=names) if names else None


def concept_of(emoji: Emoji) -> Concept:
    """A concept for an emoji that is not in `concepts.txt`: its label, and up to two other plain names; no colours."""
    label = describe(emoji.label)
    others = [] if emoji.tone or emoji.group == 9 else [clean(name) for name in emoji.synonyms]
    names = [label, *[name for name in dict.fromkeys(others) if name != label and is_plain(name)][:2]]
    marked = [f"~{name}" if is_plural(name) else name for name in names]
    return Concept(emoji.hexcode, 1.0, "n", tuple(marked))


def describe(label: str) -> str:
    """`flag: Peru` to `flag of peru`, `judge: light skin tone, red hair` to `judge with light skin and red hair`."""
    thing, _, details = label.partition(": ")
    if not details:
        return clean(label)
    if thing == "flag":
        return f"flag of {clean(details)}"
    tones = len(re.findall("skin tone", details))
    parts = [part for part in details.replace(" skin tone", " skin").split(", ") if tones < 2 or "skin" not in part]
    return clean(f"{thing} with {' and '.join(parts)}" if parts else thing)


def clean(name: str) -> str:
    """Lower case and plain punctuation: `Twelve O’Clock` to `twelve o'clock`, `red_car` to `red car`."""
    name = name.lower().replace("’", "'").replace("“", "").replace("”", "").replace("⊛", "")
    return " ".join(re.sub(r"[:;_/]", " ", name).split())


def is_plain(name: str) -> bool:
    return re.fullmatch(r"[a-z][a-z' ]{2,28}", name) is not None


def captions(concept: Concept, colour: str | None, style: str, must: bool = False) -> list[str]:
    """Four to ten different captions, the plainest first.

    `colour` is what the drawing clearly has, or None; with `must` every caption says it (hue-turned drawings). Where a
    name says a colour already, that is the one a person would name.
    """
    names = list(concept.names)
    if must and colour:
        stripped = (" ".join(w for w in name.split() if w not in COLOURS) for name in names)
        names = list(dict.fromkeys(name for name in stripped if coloured(name, colour)))
        tinted = [coloured(name, colour) or name for name in names]
        return _phrases(tinted, tinted[:1], style)
    said = any(word in COLOURS for name in names for word in name.split())
    tinted = [tint for name in names[:2] if colour and not said and (tint := coloured(name, colour))]
    return _phrases(names, tinted, style)


def _phrases(names: Sequence[str], tinted: Sequence[str], style: str) -> list[str]:
    first, best = names[0], (tinted or names)[0]
    found = [article(first)]
    found += [phrase for name in tinted for phrase in (article(name), name)]
    found += [first, *(article(name) for name in names[1:])]
    found += [f"an emoji of {article(first)}", f"{article(best)}, {style} style"]
    found += [names[1]] if len(names) > 1 else []
    found += [f"a drawing of {article(first)}"]
    return list(dict.fromkeys(phrase.removeprefix("~") for phrase in found))[:MOST]
