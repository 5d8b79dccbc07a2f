"""Icon sets and emoji names, matched by hexcode: the code points in capitals, joined by `-`, without FE0F."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Emoji:
    """What is known of one emoji: its label, other names for it, and what decides how often it is shown."""

    hexcode: str
    label: str
    synonyms: tuple[str, ...] = ()
    group: int = -1
    subgroup: int = -1
    tone: bool = False


@dataclass(frozen=True)
class Icon:
    """One drawing: the inside of an SVG and its view box (left, top, width, height)."""

    body: str
    box: tuple[float, float, float, float]


@dataclass
class Names:
    """All emoji by hexcode, and the hexcode for every spelling of a name that a set may use."""

    emoji: dict[str, Emoji] = field(default_factory=dict)
    hexcodes: dict[str, str] = field(default_factory=dict)

    def hexcode(self, name: str) -> str | None:
        return self.hexcodes.get(squeeze(name))


def normalise(hexcode: str) -> str:
    """`2764-FE0F` and `2764-fe0f` are both `2764`."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def squeeze(name: str) -> str:
    """Letters and digits only, so that `red-heart`, `red_heart` and `redheart` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("flag-for-", "flag-"))


def read_names(data: Iterable[Json], shortcodes: Iterable[Json], tables: Iterable[Mapping[str, str]]) -> Names:
    """Names from emojibase's `data.json` and shortcode files, and from tables of hexcode to icon name.

    Labels count before the sets' own tables, and those before shortcodes. Tags are not read: they say what a thing has
    to do with, not what it is; the real synonyms among them are in `concepts.txt`.
    """
    names = Names()
    rows = list(data)
    codes = _shortcodes(shortcodes)
    for row in rows:
        for entry, tone in [(row, False), *((skin, True) for skin in row.get("skins", ()))]:
            hexcode = normalise(entry["hexcode"])
            synonyms = tuple(dict.fromkeys(codes.get(hexcode, ())))
            group, subgroup = entry.get("group", -1), entry.get("subgroup", -1)
            names.emoji[hexcode] = Emoji(hexcode, entry["label"], synonyms, group, subgroup, tone)
            names.hexcodes.setdefault(squeeze(entry["label"]), hexcode)
    for table in tables:
        for hexcode, name in table.items():
            names.hexcodes.setdefault(squeeze(name), normalise(hexcode))
    for hexcode, spellings in codes.items():
        for name in spellings:
            names.hexcodes.setdefault(squeeze(name), hexcode)
    return names


def _shortcodes(files: Iterable[Json]) -> dict[str, list[str]]:
    codes: dict[str, list[str]] = {}
    for file in files:
        for hexcode, value in file.items():
            spellings = [value] if isinstance(value, str) else value
            codes.setdefault(normalise(hexcode), []).extend(name.replace("_", " ") for name in spellings)
    return codes


def read_icons(icons: Json, table: Mapping[str, str], names: Names) -> dict[str, Icon]:
    """The drawings of one set by hexcode; those whose name is nobody's emoji are left out.

    `icons` is a set's `icons.json`, `table` its `chars.json` (hexcode to name; may be empty).
    """
    by_name = {name: normalise(hexcode) for hexcode, name in table.items()}
    found: dict[str, Icon] = {}
    for name, entry in icons["icons"].items():
        hexcode = by_name.get(name) or names.hexcode(name)
        if hexcode is None or hexcode not in names.emoji or entry.get("hidden"):
            continue
        found.setdefault(hexcode, _icon(icons, entry))
    return found


def read_icon_names(path: Path | None = None) -> dict[str, dict[str, str]]:
    """`icon_names.txt`, or a file like it: for each set, hexcodes by the set's own names of icons.

    Raises `ValueError` naming the line that is not `[SET]` or `ICON HEXCODE`.
    """
    path = path or Path(__file__).with_name("icon_names.txt")
    sets: dict[str, dict[str, str]] = {}
    current: dict[str, str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if len(words) == 1 and re.fullmatch(r"\[[a-z0-9-]+\]", line):
            current = sets.setdefault(line[1:-1], {})
        elif len(words) == 2 and current is not None:
            current[words[0]] = normalise(words[1])
        else:
            raise ValueError(f"{path.name}, line {number}: expected '[SET]' or 'ICON HEXCODE', got {line!r}")
    return sets


def read_named_icons(icons: Json, table: Mapping[str, str], on_disc: bool) -> list[dict[str, Icon]]:
    """The drawings of one set whose own names `table` gives hexcodes: first drawings by hexcode, then second ones, ...

    Raises `ValueError` naming an icon that the set does not have.
    """
    layers: list[dict[str, Icon]] = []
    for name, hexcode in table.items():
        entry = icons["icons"].get(name)
        if entry is None:
            raise ValueError(f"icon_names.txt: {icons.get('prefix')} has no icon {name!r}")
        icon = _icon(icons, entry)
        icon = Icon(without_disc(icon.body), icon.box) if on_disc else icon
        for layer in layers:
            if hexcode not in layer:
                layer[hexcode] = icon
                break
        else:
            layers.append({hexcode: icon})
    return layers


def without_disc(body: str) -> str:
    """An SVG body without its first path, the disc that everything else stands on."""
    return re.sub(r"<path [^>]*/>", "", body, count=1)


BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def _icon(icons: Json, entry: Json) -> Icon:
    size = [entry.get(key, icons.get(key, default)) for key, default in BOX]
    return Icon(entry["body"], (size[0], size[1], size[2], size[3]))
