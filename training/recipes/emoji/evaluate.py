"""What an emoji model can do: held-out prompts drawn and judged, beside what real drawings of an unseen set get.

    python -m latentdiff.training.recipes.emoji.evaluate MODEL OUT --judge judge.safetensors --bundle BUNDLE \\
        --steps 4 25 --guidance 1 4

Writes `OUT/evaluation.json`, `OUT/table.md` (also printed), `OUT/page.md` with 100 unselected prompts and their
pictures, and `OUT/grid.png`, the prompts of `denoiser.yaml`. Every pair of a number of steps and a guidance is drawn.
"""

import argparse
import json
import logging
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw

from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.png import image_grid, save_picture
from latentdiff.metrics import kernel_distance
from latentdiff.pipelines import TextToImagePipeline
from latentdiff.training.loop.lettering import lettering

from .drawings import Drawing, on_white, read_bundle
from .ideals import Ideals
from .judge import Judge
from .judge_training import plain_drawings
from .measures import MEASURES, Figure, Marks, known_words, knows, mark, synonym_ratio
from .prompts import Kind, Prompt, held_out_prompts, shuffled

logger = logging.getLogger(__name__)

SHOWN = 100  # pictures on the page
SIDE, GAP, LABEL = 128, 8, 30  # pixels of a picture, between two, and for what is written below
COLUMNS = 5
TITLES = {
    **{measure.name: measure.title for measure in MEASURES},
    "known_words_five": "the synonyms' known words, within five",
    "synonym_ratio": "synonyms over known words",
}


@dataclass(frozen=True)
class Setting:
    """How pictures are drawn; the model's own guidance where it is None."""

    steps: int
    guidance: float | None

    @property
    def title(self) -> str:
        return f"{self.steps} steps" + ("" if self.guidance is None else f", guidance {self.guidance:g}")


@dataclass(frozen=True)
class Evaluation:
    """One setting's figures by name; the kernel distance is of the judge's features, None without real drawings."""

    setting: Setting
    figures: Mapping[str, Figure]
    kernel_distance: float | None
    seconds_per_picture: float


@dataclass(frozen=True)
class Yardstick:
    """How far another icon set's drawings are from the unseen set's, as pictures' kernel distance is measured."""

    set_name: str
    kernel_distance: float


def read_prompts() -> list[str]:
    """The twenty prompts of the recipe."""
    settings = yaml.safe_load(files(__package__).joinpath("denoiser.yaml").read_text(encoding="utf-8"))
    return list(settings["sample_prompts"])


def draw(pipeline: Any, prompts: Sequence[str], setting: Setting, seed: int = 0, batch: int = 16) -> list[Image.Image]:
    """One picture a prompt; the picture of prompt number i has seed `seed + i`, whatever the batch."""
    settings: dict[str, Any] = {"num_inference_steps": setting.steps}
    if setting.guidance is not None:
        settings["guidance_scale"] = setting.guidance
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        images += pipeline(chunk, seed=[seed + start + i for i in range(len(chunk))], **settings).images
        logger.info("%s: %d of %d drawn", setting.title, len(images), len(prompts))
    return images


def figures_of(marks: Sequence[Marks]) -> dict[str, Figure]:
    """By the names of `TITLES`; those that no picture tells are left out."""
    found = {measure.name: measure.of(marks) for measure in MEASURES}
    found["known_words_five"] = known_words(marks)
    found["synonym_ratio"] = synonym_ratio(marks)
    return {name: figure for name, figure in found.items() if figure is not None}


def judge_ideals(judge: Judge, ideals: Ideals, prompts: Sequence[Prompt]) -> list[Marks]:
    """The marks of real drawings, composed as the prompts ask, as far as the icon set has them."""
    composed = [(prompt, picture) for prompt in prompts if (picture := ideals(prompt)) is not None]
    return mark(judge, [prompt for prompt, _ in composed], [picture for _, picture in composed])


def distance(judge: Judge, drawn: Mapping[str, Image.Image], real: Ideals) -> float | None:
    """KID, on the judge's features, of pictures by the hexcode of their thing and real drawings of the same things."""
    both = [hexcode for hexcode in drawn if hexcode in real.plain]
    if len(both) < 2:
        return None
    features = judge.look([drawn[hexcode] for hexcode in both])[1]
    return kernel_distance(features, judge.look([on_white(real.plain[hexcode].rgba) for hexcode in both])[1]).mean


def single_things(prompts: Sequence[Prompt], pictures: Sequence[Image.Image]) -> dict[str, Image.Image]:
    """The pictures of the prompts for single things, by hexcode."""
    pairs = zip(prompts, pictures, strict=True)
    return {prompt.things[0].hexcode: picture for prompt, picture in pairs if prompt.kind == Kind.OBJECTS}


def yardstick(judge: Judge, ideals: Ideals, others: Ideals) -> Yardstick | None:
    """The kernel distance of the same things in another icon set; None where it has too few of them."""
    away = distance(judge, {hexcode: on_white(one.rgba) for hexcode, one in others.plain.items()}, ideals)
    return None if away is None else Yardstick(others.set_name, away)


def evaluate(
    pipeline: Any, prompts: Sequence[Prompt], judge: Judge, setting: Setting, ideals: Ideals | None
) -> tuple[Evaluation, list[Image.Image], list[Marks]]:
    """The figures of one setting, and the pictures with their marks."""
    start = time.monotonic()
    pictures = draw(pipeline, [prompt.text for prompt in prompts], setting)
    seconds = (time.monotonic() - start) / len(prompts)
    marks = mark(judge, prompts, pictures)
    away = distance(judge, single_things(prompts, pictures), ideals) if ideals else None
    return Evaluation(setting, figures_of(marks), away, seconds), pictures, marks


def chosen_prompts(judge: Judge, most: int | None = None) -> list[Prompt]:
    """The prompts whose things the judge knows; `most` of them, of every kind in proportion, chosen by their texts."""
    prompts = [prompt for prompt in held_out_prompts() if knows(judge, prompt)]
    if most is None or most >= len(prompts):
        return prompts
    kept = set(shuffled([prompt.text for prompt in prompts], key=str)[:most])
    return [prompt for prompt in prompts if prompt.text in kept]


def real_drawings(bundle: Path, prompts: Sequence[Prompt], unseen: str) -> tuple[list[Drawing], str | None]:
    """Drawings of the things that prompts name: the unseen set's, another set's, and for prompts of styles all sets'.

    The other set is the coloured one that has most of them; its name is returned, None where there is no other.
    """
    wanted = {asked.hexcode for prompt in prompts for asked in prompt.things}
    styled = {prompt.things[0].hexcode for prompt in prompts if prompt.style}
    jobs = [job for job in read_bundle(bundle) if job.concept.hexcode in wanted]
    sets = Counter(job.set_name for job in jobs if job.set_name != unseen and job.style != "outline")
    other = max(sets, key=lambda name: sets[name]) if sets else None
    return plain_drawings([j for j in jobs if j.set_name in (unseen, other) or j.concept.hexcode in styled]), other


def labelled(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """The pictures in rows, each with its label below in at most two lines.

    Raises:
        ValueError: not one label for each picture, or no pictures.
    """
    if len(pictures) != len(labels) or not pictures:
        raise ValueError(f"{len(pictures)} pictures with {len(labels)} labels make no page")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + LABEL + GAP) + GAP), "white")
    pen = ImageDraw.Draw(page)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = GAP + number % columns * (SIDE + GAP)
        top = GAP + number // columns * (SIDE + LABEL + GAP)
        page.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        pen.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline="#dddddd")
        written, font = lettering(label, 11)
        lines = textwrap.wrap(written, 23)[:2]
        for line, text in enumerate(lines):
            pen.text((left + SIDE / 2, top + SIDE + 8 + 13 * line), text, fill="#333333", font=font, anchor="mm")
    return page


def write_page(
    pictures: Sequence[Image.Image], labels: Sequence[str], folder: Path, about: str, each: int = 20
) -> list[Path]:
    """`page.md` and its pictures `page-1.png` and so on, `each` in one; returns the paths of the pictures."""
    files = []
    for start in range(0, len(pictures), each):
        file = folder / f"page-{start // each + 1}.png"
        save_picture(labelled(pictures[start : start + each], labels[start : start + each]), file)
        files.append(file)
    shown = "\n\n".join(
        f"![{'; '.join(labels[i * each : (i + 1) * each])}]({file.name})" for i, file in enumerate(files)
    )
    text = f"# {len(pictures)} prompts, unselected\n\n{about}\n\n{shown}\n"
    write_text_whole(folder / "page.md", text)
    return files


def table(titles: Mapping[str, str], ceiling: Mapping[str, Figure], columns: Mapping[str, Mapping[str, Figure]]) -> str:
    """Markdown: a row for each of `titles` (by the figure's name), the ceiling, and a column for each of `columns`.

    A cell is the figure with its standard error, and the share of the ceiling.
    """
    named = [name for name in titles if name in ceiling or any(name in found for found in columns.values())]
    counts = {name: next(found[name].count for found in columns.values() if name in found) for name in named}
    lines = [f"| measure | pictures | {' | '.join(columns)} | ceiling |", f"|{'---|' * (len(columns) + 3)}"]
    for name in named:
        cells = [cell(found.get(name), ceiling.get(name)) for found in columns.values()]
        lines.append(f"| {titles[name]} | {counts[name]} | {' | '.join(cells)} | {cell(ceiling.get(name), None)} |")
    return "\n".join(lines) + "\n"


def cell(figure: Figure | None, ceiling: Figure | None) -> str:
    if figure is None:
        return ""
    text = f"{100 * figure.value:.1f} ± {100 * figure.error:.1f} %"
    part = figure.over(ceiling) if ceiling else None
    return f"{text} ({100 * part.value:.0f} %)" if part else text


def write_report(
    output: Path,
    about: Mapping[str, Any],
    ceiling: Mapping[str, Figure],
    found: Sequence[Evaluation],
    other: Yardstick | None = None,
) -> str:
    """`evaluation.json` and `table.md`; returns the table."""
    text = table(TITLES, ceiling, {one.setting.title: one.figures for one in found})
    text += "\nWith standard errors; in brackets the share of the ceiling, which composed real drawings get.\n"
    for one in found:
        away = "" if one.kernel_distance is None else f", kernel distance {one.kernel_distance:.3f}"
        text += f"\n{one.setting.title}: {one.seconds_per_picture:.2f} s a picture{away}\n"
    if other:
        text += f"\nKernel distance of another set of real drawings, {other.set_name}: {other.kernel_distance:.3f}\n"
    report = {
        **about,
        "ceiling": {name: asdict(figure) for name, figure in ceiling.items()},
        "settings": [asdict(one) for one in found],
        "yardstick": asdict(other) if other else None,
    }
    write_text_whole(output / "evaluation.json", json.dumps(report, indent=2) + "\n")
    write_text_whole(output / "table.md", text)
    return text


def show(output: Path, prompts: Sequence[Prompt], pictures: Sequence[Image.Image], setting: Setting) -> None:
    """The page of pictures, chosen by their prompts' texts alone."""
    pairs = dict(zip([prompt.text for prompt in prompts], pictures, strict=True))
    texts = shuffled(pairs, key=lambda text: f"page {text}")[:SHOWN]
    about = f"Drawn with {setting.title}, one picture each. Which prompts are shown was chosen before they were drawn."
    write_page([pairs[text] for text in texts], texts, output, about)


def settings_of(steps: Sequence[int], guidance: Sequence[float] | None) -> Iterator[Setting]:
    scales: Sequence[float | None] = guidance or [None]
    for count in steps:
        for scale in scales:
            yield Setting(count, scale)


def run(options: argparse.Namespace) -> str:
    """Everything; returns the table."""
    judge = Judge.load(options.judge)
    prompts = chosen_prompts(judge, options.prompts)
    drawings, other_set = real_drawings(options.bundle, prompts, judge.left_out) if options.bundle else ([], None)
    ideals = Ideals(drawings, judge.left_out) if options.bundle else None
    ceiling = figures_of(judge_ideals(judge, ideals, prompts)) if ideals else {}
    ceiling.pop("synonym_ratio", None)  # real drawings have no words
    other = yardstick(judge, ideals, Ideals(drawings, other_set)) if ideals and other_set else None
    pipeline = TextToImagePipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    found: list[Evaluation] = []
    for setting in settings_of(options.steps, options.guidance):
        evaluation, pictures, marks = evaluate(pipeline, prompts, judge, setting, ideals)
        if not found:
            show(options.output, prompts, pictures, setting)
            save_picture(image_grid(draw(pipeline, read_prompts(), setting), 5), options.output / "grid.png")
            save_marks(options.output / "marks.json", marks)
        found.append(evaluation)
    about = {"model": str(options.model), "prompts": len(prompts), "unseen_set": judge.left_out}
    return write_report(options.output, about, ceiling, found, other)


def save_marks(file: Path, marks: Sequence[Marks]) -> None:
    """What was asked and what was found, picture by picture."""
    rows = []
    for one in marks:
        facts = {name: value for name, value in vars(one).items() if name != "prompt" and value is not None}
        rows.append({"kind": one.prompt.kind, "prompt": one.prompt.text, **facts})
    write_text_whole(file, json.dumps(rows, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evaluate", description="Draw and judge an emoji model.")
    parser.add_argument("model", help="pipeline folder, or the name of a packaged model")
    parser.add_argument("output", type=Path, help="folder for the report")
    parser.add_argument("--judge", type=Path, required=True, help="a judge that '...emoji.judge train' wrote")
    parser.add_argument("--bundle", type=Path, help="real drawings, for the ceiling and the kernel distance")
    parser.add_argument("--steps", type=int, nargs="+", default=[25])
    parser.add_argument("--guidance", type=float, nargs="+", help="by default the model's own")
    parser.add_argument("--prompts", type=int, help="draw so many of the prompts only")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    try:
        print(run(options))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
