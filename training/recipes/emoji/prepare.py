"""Writes a folder of captioned emoji pictures, `images/` and `metadata.jsonl`, or a bundle to draw them from elsewhere.

    python -m latentdiff.training.recipes.emoji.prepare OUT --subset common
    python -m latentdiff.training.recipes.emoji.prepare OUT --scenes 20000
    python -m latentdiff.training.recipes.emoji.prepare --bundle OUT.xz

The first folder holds each drawing once, with its copies in other colours; the second holds composed scenes.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from .captions import captions, clean, concept_of, read_concepts, without_unseen
from .drawings import SPLITS, Job, draw_job, on_white, render_all, write_bundle
from .fetch import ICON_SETS, NAMES, Package, fetch, read_json
from .held_out import colour_held_out
from .icons import Emoji, Icon, Names, read_icon_names, read_icons, read_named_icons, read_names
from .scenes import Composer

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
FLAGS = {
    *("Argentina", "Australia", "Austria", "Belgium", "Brazil", "Canada", "Chile", "China", "Colombia", "Denmark"),
    *("Egypt", "Finland", "France", "Germany", "Greece", "India", "Indonesia", "Ireland", "Israel", "Italy", "Japan"),
    *("Kenya", "Mexico", "Netherlands", "New Zealand", "Nigeria", "Norway", "Pakistan", "Peru", "Poland", "Portugal"),
    *("Russia", "South Africa", "South Korea", "Spain", "Sweden", "Switzerland", "Turkey", "Türkiye", "Ukraine"),
    *("United Kingdom", "United States", "Vietnam", "European Union"),
}  # the countries whose flags are shown
TURNED_WEIGHT = 0.12  # of the drawing's own; a drawing has up to six turned copies
COMMON = {2.0: 1.0, 3.0: 7.5}  # the weights that make the subset `common`, and how often it shows them


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
    by_unicode = [package.short_name for package in packages if package.by_unicode]
    tables = {name: read_json(archives[name], "chars.json") for name in by_unicode}
    shortcodes = [read_json(names_archive, f"en/shortcodes/{name}.json") for name in SHORTCODES]
    unicode_names = read_json(names_archive, "meta/unicode-names.json")
    names = read_names(read_json(names_archive, "en/data.json"), shortcodes, [*tables.values(), unicode_names])
    by_name = read_icon_names()
    sets: dict[str, dict[str, Icon]] = {}
    for package in packages:
        name, icons = package.short_name, read_json(archives[package.short_name], "icons.json")
        if package.by_unicode:
            sets[name] = read_icons(icons, tables[name], names)
            continue
        for number, layer in enumerate(read_named_icons(icons, by_name[name], package.on_disc), 1):
            sets[name if number == 1 else f"{name}-{number}"] = layer
    groups = read_json(names_archive, "meta/groups.json")["subgroups"]
    return names, sets, {int(number) for number, name in groups.items() if name in LETTERS}


def style_of(set_name: str) -> str:
    """The drawing style of a set, also of its second drawings (`ph-2`); the set's name if nobody knows it."""
    styles = {package.short_name: package.style for package in ICON_SETS}
    return styles.get(set_name) or styles.get(re.sub(r"-\d+$", "", set_name), set_name)


def held_out(key: str, share: float) -> bool:
    """Whether the drawing `key` is held out: the same answer on every machine and in every subset."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < share * 2**32


def weight_of(emoji: Emoji, letters: set[int]) -> float:
    """How often to show an emoji that is not in `concepts.txt`; 0 leaves it out.

    Left out are letters, clock faces, signs, and of people and their skin tones what `concepts.txt` does not name.
    """
    if emoji.tone or emoji.subgroup in letters or "o'clock" in clean(emoji.label) or "-thirty" in emoji.label:
        return 0.0
    if emoji.group == 9:
        return 0.25 if emoji.label.removeprefix("flag: ") in FLAGS else 0.0
    return dict.fromkeys((0, 3, 4, 5, 6, 7), 0.9).get(emoji.group, 0.0)


def jobs(names: Names, sets: dict[str, dict[str, Icon]], letters: set[int], subset: str, share: float) -> Iterator[Job]:
    """The drawings of a subset, `all` or `common`, with their captions' concept and their weight."""
    common = read_concepts()
    unseen = [name for concept in common.values() for name in concept.unseen]
    for set_name, icons in sets.items():
        for hexcode, icon in icons.items():
            emoji = names.emoji[hexcode]
            concept = common.get(hexcode) or without_unseen(concept_of(emoji), unseen)
            if concept is None:
                continue
            if subset == "common" and (hexcode not in common or concept.weight not in COMMON):
                continue
            weight = concept.weight if hexcode in common else weight_of(emoji, letters)
            if subset == "common":
                weight = COMMON[weight]
            if weight == 0:
                continue
            split = "validation" if held_out(f"{set_name}-{hexcode}", share) else "train"
            style, group = style_of(set_name), GROUPS.get(emoji.group, "")
            yield Job(set_name, style, icon, concept, weight, split, group)


def draw(job: Job, folder: Path, size: int) -> list[Row] | str:
    """Draws `job` and its hue-turned copies into `folder/images`: their rows, or why it cannot be drawn."""
    try:
        found = draw_job(job, size)
    except ValueError as error:
        return f"{job.set_name} {job.concept.hexcode}: {error}"
    rows = []
    for one in found:
        unsaid = one.colour is None or colour_held_out(one.colour, one.concept.hexcode)
        text = captions(one.concept, None if unsaid else one.colour, job.style, must=one.turned)
        name = f"images/{job.set_name}-{one.concept.hexcode}{f'-{one.colour}' if one.turned else ''}.png"
        weight = round(job.weight * TURNED_WEIGHT, 4) if one.turned else job.weight
        rows.append(Row(name, text, job.group, weight, job.split))
        on_white(one.rgba).save(folder / name)
    return rows


def write(todo: Sequence[Job], output: Path, size: int, workers: int) -> int:
    """Writes the dataset folder whole: drawn beside `output`, then renamed. Returns how many pictures it holds."""
    with _whole(output) as folder, ProcessPoolExecutor(workers) as pool:
        n = len(todo)
        rows: list[Row] = []
        for result in pool.map(draw, todo, [folder] * n, [size] * n, chunksize=16):
            if isinstance(result, str):
                print(f"left out: {result}", file=sys.stderr)
            else:
                rows += result
        _write_rows(folder, rows)
    return len(rows)


def write_scenes(todo: Sequence[Job], output: Path, count: int, size: int, workers: int, seed: int = 0) -> int:
    """Writes `count` composed scenes as a dataset folder, whole; validation's are 1 in 50. Returns how many."""
    with _whole(output) as folder:
        drawings = render_all(todo, size, workers)
        composer = {split: Composer(drawings, size, seed, split) for split in SPLITS}
        rows = []
        for index in range(count):
            split = SPLITS[index % 50 == 49]
            scene = composer[split](index)
            name = f"images/{index:07d}.png"
            Image.fromarray(scene.picture).save(folder / name)
            rows.append(Row(name, list(scene.captions), scene.kind, 1.0, split))
        _write_rows(folder, rows)
    return count


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A folder with an `images` in it that becomes `output` when all went well, and is gone when not."""
    if output.exists():
        raise FileExistsError(f"{output} exists already; name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        (folder / "images").mkdir(parents=True)
        yield folder
        os.replace(folder, output)


def _write_rows(folder: Path, rows: Sequence[Row]) -> None:
    lines = [f"{json.dumps(asdict(row))}\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="prepare", description="Make captioned emoji pictures, or a bundle of them.")
    parser.add_argument("output", type=Path, nargs="?", help="the folder to write; it must not exist yet")
    parser.add_argument("--bundle", type=Path, help="write the drawings as one small file")
    parser.add_argument("--scenes", type=int, help="fill the folder with this many composed scenes")
    parser.add_argument("--subset", choices=("all", "common"), default="all")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/latentdiff/emoji", help="npm archives")
    parser.add_argument("--size", type=int, default=128, help="pixels on a side")
    parser.add_argument("--validation", type=float, default=0.01, help="share of the drawings held out")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.output is None and options.bundle is None:
        parser.error("name a folder to write, or --bundle FILE, or both")
    if options.scenes is not None and (options.output is None or options.scenes < 1):
        parser.error(f"--scenes {options.scenes}: expected 1 or more, and a folder to write them to")
    try:
        todo = list(jobs(*load(options.cache), options.subset, options.validation))
        if options.bundle:
            print(f"{options.bundle}: {write_bundle(todo, options.bundle)} bytes, {len(todo)} drawings")
        if options.output and options.scenes is not None:
            count = write_scenes(todo, options.output, options.scenes, options.size, options.workers)
            print(f"{options.output}: {count} scenes of {len(todo)} drawings")
        elif options.output:
            count = write(todo, options.output, options.size, options.workers)
            print(f"{options.output}: {count} pictures of {len(todo)} drawings")
    except (RuntimeError, FileExistsError, ValueError) as error:
        sys.exit(f"prepare: {error}")


if __name__ == "__main__":
    main()
