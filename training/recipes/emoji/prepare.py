"""Writes a folder of captioned emoji pictures: `images/SET-HEXCODE[-COLOUR].png` and `metadata.jsonl`.

python -m latentdiff.training.recipes.emoji.prepare OUT --subset common
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from .captions import Concept, captions, concept_of, read_concepts
from .colour import TARGETS, colour_name, turn
from .draw import on_white, render
from .fetch import ICON_SETS, NAMES, Package, fetch, read_json
from .icons import Emoji, Icon, Names, read_icons, read_names

SHORTCODES = ("github", "iamcal", "emojibase", "joypixels")
LETTERS = {"alphanum", "keycap", "arrow", "av-symbol", "punctuation", "math", "currency"}
GROUPS = {
    0: "smileys",
    1: "people",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}  # Unicode's groups, by their numbers in the names' tables
TURNED_WEIGHT = 0.12  # of the drawing's own; a drawing has up to six turned copies
COMMON = {2.0: 1.0, 3.0: 7.5}  # the weights that make the subset `common`, and how often it shows them


@dataclass(frozen=True)
class Job:
    """One drawing to make: of which set, thing and group, how often to show it, whether to hold it out."""

    set_name: str
    style: str
    icon: Icon
    concept: Concept
    weight: float
    split: str
    group: str


@dataclass(frozen=True)
class Row:
    """One line of `metadata.jsonl`."""

    file_name: str
    text: list[str]
    group: str
    weight: float
    split: str


def load(cache: Path, packages: Sequence[Package] = ICON_SETS) -> tuple[Names, dict[str, dict[str, Icon]], set[int]]:
    """Names, the drawings of each set by hexcode, and the subgroups that hold letters, keycaps and arrows."""
    archives = {package.short_name: fetch(package, cache) for package in packages}
    names_archive = fetch(NAMES, cache)
    tables = {name: read_json(path, "chars.json") for name, path in archives.items()}
    shortcodes = [read_json(names_archive, f"en/shortcodes/{name}.json") for name in SHORTCODES]
    unicode_names = read_json(names_archive, "meta/unicode-names.json")
    names = read_names(read_json(names_archive, "en/data.json"), shortcodes, [*tables.values(), unicode_names])
    sets = {name: read_icons(read_json(path, "icons.json"), tables[name], names) for name, path in archives.items()}
    groups = read_json(names_archive, "meta/groups.json")["subgroups"]
    return names, sets, {int(number) for number, name in groups.items() if name in LETTERS}


def held_out(key: str, share: float) -> bool:
    """Whether the drawing `key` is held out: the same answer on every machine and in every subset."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < share * 2**32


def weight_of(emoji: Emoji, letters: set[int]) -> float:
    """How often to show an emoji that is not among the common things; 0 leaves it out."""
    if emoji.subgroup in letters or emoji.group in (-1, 2) or "o'clock" in emoji.label or "-thirty" in emoji.label:
        return 0.0
    if emoji.tone:
        return 0.1
    return {1: 0.4, 8: 0.3, 9: 0.15}.get(emoji.group, 1.0)


def jobs(names: Names, sets: dict[str, dict[str, Icon]], letters: set[int], subset: str, share: float) -> Iterator[Job]:
    """The drawings of a subset, `all` or `common`, with their captions' concept and their weight."""
    common = read_concepts()
    styles = {package.short_name: package.style for package in ICON_SETS}
    for set_name, icons in sets.items():
        for hexcode, icon in icons.items():
            emoji = names.emoji[hexcode]
            concept = common.get(hexcode)
            if subset == "common" and (concept is None or concept.weight not in COMMON):
                continue
            weight = concept.weight if concept else weight_of(emoji, letters)
            if subset == "common":
                weight = COMMON[weight]
            if weight == 0:
                continue
            split = "validation" if held_out(f"{set_name}-{hexcode}", share) else "train"
            style, group = styles.get(set_name, set_name), GROUPS.get(emoji.group, "")
            yield Job(set_name, style, icon, concept or concept_of(emoji), weight, split, group)


def draw(job: Job, folder: Path, size: int) -> list[Row]:
    """Draws `job` and its hue-turned copies into `folder/images`; their rows."""
    rgba = render(job.icon, size)
    concept = job.concept
    colour = None if concept.flag == "n" else colour_name(rgba)
    name = f"images/{job.set_name}-{concept.hexcode}"
    rows = [Row(f"{name}.png", captions(concept, colour, job.style), job.group, job.weight, job.split)]
    on_white(rgba).save(folder / rows[0].file_name)
    if concept.flag != "t":
        return rows
    for target in TARGETS:
        turned = None if target == colour else turn(rgba, target)
        if turned is None or colour_name(turned, 0.4) != target:
            continue
        text = captions(concept, target, job.style, must=True)
        weight = round(job.weight * TURNED_WEIGHT, 4)
        rows.append(Row(f"{name}-{target}.png", text, job.group, weight, job.split))
        on_white(turned).save(folder / rows[-1].file_name)
    return rows


def _draw_or_say(job: Job, folder: Path, size: int) -> list[Row] | str:
    try:
        return draw(job, folder, size)
    except ValueError as error:
        return f"{job.set_name} {job.concept.hexcode}: {error}"


def write(todo: Sequence[Job], output: Path, size: int, workers: int) -> int:
    """Writes the dataset folder whole: drawn beside `output`, then renamed. Returns how many pictures it holds."""
    if output.exists():
        raise FileExistsError(f"{output} exists already; name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        (folder / "images").mkdir(parents=True)
        count = 0
        with (
            ProcessPoolExecutor(workers) as pool,
            (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata,
        ):
            n = len(todo)
            for result in pool.map(_draw_or_say, todo, [folder] * n, [size] * n, chunksize=16):
                if isinstance(result, str):
                    print(f"left out: {result}", file=sys.stderr)
                    continue
                count += len(result)
                metadata.writelines(json.dumps(asdict(row)) + "\n" for row in result)
        os.replace(folder, output)
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="prepare", description="Make a folder of captioned emoji pictures.")
    parser.add_argument("output", type=Path, help="the folder to write; it must not exist yet")
    parser.add_argument("--subset", choices=("all", "common"), default="all")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/latentdiff/emoji", help="npm archives")
    parser.add_argument("--size", type=int, default=128, help="pixels on a side")
    parser.add_argument("--validation", type=float, default=0.01, help="share of the drawings held out")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        todo = list(jobs(*load(options.cache), options.subset, options.validation))
        count = write(todo, options.output, options.size, options.workers)
    except (RuntimeError, FileExistsError, ValueError) as error:
        sys.exit(f"prepare: {error}")
    print(f"{options.output}: {count} pictures of {len(todo)} drawings")


if __name__ == "__main__":
    main()
