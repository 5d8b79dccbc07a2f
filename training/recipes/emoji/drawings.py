"""SVG to pixels, all drawings in memory, and the bundle: one small file from which any machine draws all of them.

A bundle is JSON lines compressed by xz: a header, then one drawing a line, as SVG with its concept and its weight.
"""

import io
import json
import lzma
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .captions import FLAGS, Concept
from .colour import TARGETS, colour_name, measure, turn
from .held_out import colour_held_out
from .icons import Icon

Rgba = NDArray[np.uint8]

PROBE = 64  # pixels of the small drawing that tells where the ink is
MAX_ZOOM = 1.3  # small drawings stay somewhat smaller than the others
FORMAT = "latentdiff emoji drawings"
VERSION = 1
SPLITS = ("train", "validation")


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
class Drawing:
    """A drawing as pixels.

    `colour` is the one it clearly has, or None; `turned` says that it is not the colour it was drawn in. `rgba` is
    (size, size, 4) uint8, straight alpha. The colours of a concept with flag `n` are not told.
    """

    set_name: str
    style: str
    concept: Concept
    group: str
    weight: float
    split: str
    colour: str | None
    turned: bool
    rgba: Rgba


def render(icon: Icon, size: int = 128, fill: float = 0.92) -> Rgba:
    """`icon` as (size, size, 4) RGBA, straight alpha; its ink is centred and its longer side `fill` of the picture.

    Raises `ValueError` when the SVG cannot be drawn or draws nothing.
    """
    left, top, width, height = icon.box
    side = max(width, height)
    centre = (left + width / 2, top + height / 2)
    ink = _render(icon.body, centre, side, PROBE)[..., 3] > 16
    if not ink.any():
        raise ValueError("the SVG draws nothing")
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    unit = side / PROBE
    longer = (max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1) * unit
    centre = (
        centre[0] + ((columns[0] + columns[-1] + 1) - PROBE) / 2 * unit,
        centre[1] + ((rows[0] + rows[-1] + 1) - PROBE) / 2 * unit,
    )
    return _render(icon.body, centre, max(longer, side / MAX_ZOOM) / fill, size)


def _render(body: str, centre: tuple[float, float], side: float, size: int) -> Rgba:
    import resvg_py

    box = f"{centre[0] - side / 2:g} {centre[1] - side / 2:g} {side:g} {side:g}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{box}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def on_white(rgba: Rgba) -> Image.Image:
    """(H, W, 4) RGBA as an RGB picture on a white background."""
    picture = Image.fromarray(rgba, "RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def render_all(jobs: Sequence[Job], size: int = 128, workers: int = 1) -> list[Drawing]:
    """Every job drawn, each followed by its copies in other colours, in the order of `jobs` for any `workers`.

    Copies are made for concepts with flag `t`, never of outlines or in a colour held out of the thing. Jobs that cannot
    be drawn are left out, with a line on stderr.
    """
    draw = partial(_draw_or_say, size=size)
    found: list[Drawing] = []
    if workers <= 1:
        found = [drawing for result in map(draw, jobs) for drawing in _told(result)]
    else:
        with ProcessPoolExecutor(workers) as pool:
            for result in pool.map(draw, jobs, chunksize=16):
                found += _told(result)
    return found


def _told(result: list[Drawing] | str) -> list[Drawing]:
    if isinstance(result, str):
        print(f"left out: {result}", file=sys.stderr)
        return []
    return result


def _draw_or_say(job: Job, size: int) -> list[Drawing] | str:
    try:
        return draw_job(job, size)
    except ValueError as error:
        return f"{job.set_name} {job.concept.hexcode}: {error}"


def draw_job(job: Job, size: int) -> list[Drawing]:
    """`job` drawn, and its copies in other colours. Raises `ValueError` when the SVG draws nothing."""
    rgba = render(job.icon, size)
    colour = None if job.concept.flag == "n" else colour_name(rgba)
    found = [_drawing(job, colour, False, rgba)]
    if job.concept.flag != "t" or job.style == "outline":
        return found
    pixels = measure(rgba)
    for target in TARGETS:
        if target == colour or colour_held_out(target, job.concept.hexcode):
            continue
        turned = turn(rgba, target, pixels)
        if turned is not None and colour_name(turned[::2, ::2], 0.4) == target:
            found.append(_drawing(job, target, True, turned))
    return found


def _drawing(job: Job, colour: str | None, turned: bool, rgba: Rgba) -> Drawing:
    return Drawing(job.set_name, job.style, job.concept, job.group, job.weight, job.split, colour, turned, rgba)


def write_bundle(jobs: Sequence[Job], path: Path) -> int:
    """Writes `path` whole or not at all; returns its bytes."""
    lines = [json.dumps({"format": FORMAT, "version": VERSION, "drawings": len(jobs)})]
    lines += [json.dumps(_row(job), ensure_ascii=False, separators=(",", ":")) for job in jobs]
    packed = lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        whole = Path(temporary) / path.name
        whole.write_bytes(packed)
        os.replace(whole, path)
    return len(packed)


def read_bundle(path: Path) -> list[Job]:
    """The drawings of a bundle, in its order.

    Raises `ValueError`, naming the file, the line and the key, for what is not a bundle or not a whole one.
    """
    try:
        text = lzma.decompress(Path(path).read_bytes()).decode()
    except (lzma.LZMAError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(
            f"{path}: not a whole xz file of text ({error}); write it again with prepare --bundle"
        ) from None
    lines = text.splitlines()
    header = _parse(path, 1, lines[0] if lines else "")
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(
            f"{path}, line 1: expected format {FORMAT!r}, version {VERSION}, got {header.get('format')!r}, "
            f"version {header.get('version')!r}; write it again with prepare --bundle"
        )
    if header.get("drawings") != len(lines) - 1:
        raise ValueError(f"{path}: {header.get('drawings')} drawings announced, {len(lines) - 1} found; it was cut off")
    return [_job(path, number, _parse(path, number, line)) for number, line in enumerate(lines[1:], 2)]


def _row(job: Job) -> dict[str, Any]:
    concept = job.concept
    names = [*concept.names, *(f"?{name}" for name in concept.unseen)]
    return {
        "set": job.set_name,
        "style": job.style,
        "thing": concept.hexcode,
        "names": names,
        "flag": concept.flag,
        "concept_weight": concept.weight,
        "group": job.group,
        "weight": job.weight,
        "split": job.split,
        "box": job.icon.box,
        "svg": job.icon.body,
    }


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
    return row


def _job(path: Path, number: int, row: dict[str, Any]) -> Job:
    where = f"{path}, line {number}"

    def text(key: str, choices: Sequence[str] = ()) -> str:
        value = row.get(key)
        if not isinstance(value, str) or (choices and value not in choices):
            raise ValueError(f"{where}: {key!r} must be {f'one of {choices}' if choices else 'text'}, got {value!r}")
        return value

    def numbers(key: str, count: int) -> tuple[float, ...]:
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        found = [float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
        if not len(found) == len(values) == count:
            raise ValueError(f"{where}: {key!r} must be {count} number{'s' * (count > 1)}, got {value!r}")
        return tuple(found)

    words = row.get("names")
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"{where}: 'names' must be a list of texts, got {words!r}")
    names = tuple(word for word in words if not word.startswith("?"))
    unseen = tuple(word[1:] for word in words if word.startswith("?"))
    if not names:
        raise ValueError(f"{where}: 'names' has none that a caption may use, got {words!r}")
    left, top, width, height = numbers("box", 4)
    concept = Concept(text("thing"), numbers("concept_weight", 1)[0], text("flag", FLAGS), names, unseen)
    icon = Icon(text("svg"), (left, top, width, height))
    weight = numbers("weight", 1)[0]
    return Job(text("set"), text("style"), icon, concept, weight, text("split", SPLITS), text("group"))
