"""``latentdiff generate``."""

import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from latentdiff.deferred import imports_deferred, is_tried
from latentdiff.imports import collector_paused, load_module
from latentdiff.pipelines.batch.drawing_options import (
    BATCH,
    MOST,
    NOT_FINITE,
    GenerateOptions,
    Plain,
)
from latentdiff.pipelines.commands.kind_options import check_words, flag_of, given_in
from latentdiff.pipelines.commands.model_options import (
    FAILED,
    INTERRUPTED,
    LoadingOptions,
    grouped,
    load_pipeline,
)
from latentdiff.pipelines.commands.refiner import find_refiner
from latentdiff.pipelines.registry import kind_in
from latentdiff.pipelines.storage.places import find_place
from latentdiff.terminal import say

if TYPE_CHECKING:
    from latentdiff.pipelines.batch.draw import Drawn, PictureWriter, SourcePictures
    from latentdiff.pipelines.batch.record import Settings

FRAMES = 8  # of a filmstrip
FLAGS = {"image": "--image", "mask_image": "--mask"}


class SourceOptions(Plain):
    """What pictures are made of besides words and the model."""

    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Class to draw, of a model of classes; may be repeated."),
    ] = None
    image: Path | None = Field(
        None, description="Picture to start from; it keeps its shape and, near the size of training, its size."
    )
    mask: Path | None = Field(None, description="White where to paint in the picture of --image, and as large.")
    seed: int | None = Field(None, ge=0, description="Picture i is drawn with SEED + i; by default random, and shown.")
    variation_seed: int | None = Field(
        None, ge=0, description="Draw variations of the picture of SEED: picture i mixes in VARIATION_SEED + i."
    )


class TargetOptions(Plain):
    """Which files are written."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file to write; by default named after the prompt.")
    ] = None
    separate: Annotated[bool, typer.Option("--separate", help="One file for each picture instead of a grid.")] = False
    filmstrip: Path | None = Field(None, description="PNG file that shows how the pictures came to be, step by step.")
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file even if this program did not write it.")
    ] = False


Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Let a server draw that `latentdiff serve` started, such as http://host:8000."),
]


def puts_imports_off(command: Callable[..., None]) -> Callable[..., None]:
    """A command that defers imports, with versions of packages that this was tried with.

    Not if it may have to make a runtime's graphs: that takes PyTorch's tracer.
    """

    @wraps(command)
    def run(**given: Any) -> None:
        deferred = not given["loading"].runtime and is_tried()
        with imports_deferred(unless="torch") if deferred else nullcontext():
            command(**given)

    return run


@grouped
@puts_imports_off
def generate(
    context: typer.Context,
    target: TargetOptions,
    loading: LoadingOptions,
    source: SourceOptions,
    drawing: GenerateOptions,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw, in quotes; not for models without text.")
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Pictures for each prompt or class, in one grid.")
    ] = 1,
    server: Server = None,
) -> None:
    """Draw pictures from words; or of classes, or of whatever a model without text was trained on.

    latentdiff generate "a red car" -o car.png

    latentdiff generate "a red car" --image sketch.png --strength 0.7

    latentdiff generate --model runs/birds --class owl --class robin -n 4

    latentdiff generate --model runs/faces -n 16

    The file keeps prompt, seed, settings and the model's digest; `latentdiff replay` draws it again.

    A picture drawn earlier by this program is replaced, other files are not.
    """
    prompts = prompts or []
    check_request(prompts, count, source, drawing)
    items = prompts or source.classes or [""]
    total = len(items) * count
    files = files_of(target, items[0], total, drawing.candidates)
    if server is not None:
        from latentdiff.pipelines.commands.remote import draw_at

        named = getattr(context.get_parameter_source("model"), "name", "DEFAULT") != "DEFAULT"
        draw_at(server, prompts, count, (target, loading, source, drawing), files, loading.model if named else None)
        return
    place = find_place(loading.model, loading.variant)
    kind = pipeline_kind(place, source.image, source.mask)
    check_words(kind, prompts, source.classes, loading, drawing, source)
    refiner, drawing = find_refiner(drawing, loading.variant, source.mask or target.filmstrip)

    from latentdiff.interchange.fingerprint import digest_in_background
    from latentdiff.interchange.folders import check_clip_source

    check_clip_source(drawing.reranker)
    digest = digest_in_background(place, loading.variant)
    started = time.perf_counter()
    load_module("latentdiff.pipelines.batch.draw")
    from latentdiff.pipelines.batch.draw import PictureWriter, plan_batches, read_inputs
    from latentdiff.pipelines.batch.effects import check_effects

    inputs, used = read_inputs(source.image, source.mask)
    pipeline = drawing_pipeline(place, kind, prompts, (target, loading, source, drawing))
    settings = prepared(pipeline, (loading, source, drawing), inputs, used)
    if refiner is not None:
        refiner.join(pipeline, loading.device, loading.precision, loading.scheduler)
    check_effects(pipeline, settings, shown=flag_of)
    seed = int.from_bytes(os.urandom(4)) if source.seed is None else source.seed
    writer = PictureWriter(
        pipeline,
        settings,
        plan_batches(items, drawing.candidates or count, seed, source.variation_seed, BATCH),
        files,
        columns=count if len(items) > 1 and count > 1 else math.isqrt(total - 1) + 1,
        digest=digest.result,
        refiner_digest=None if refiner is None else refiner.digest.result,
    )
    draw(writer, items, count, inputs, target.filmstrip)
    gc.unfreeze()
    say_written(writer, None if source.variation_seed is None else seed, time.perf_counter() - started)
    if any(one.spoilt for one in writer.drawn):
        raise typer.Exit(FAILED)


def say_written(writer: "PictureWriter", varied: int | None, seconds: float) -> None:
    """Say which files were written; varied: the seed of which the pictures are variations."""
    seeds = seeds_text([writer.seed_of(one) for one in writer.drawn])
    if varied is not None:
        seeds = f"seed {varied}, variation {seeds}"
    if writer.written:
        say(f"{files_text(writer.written)}: {seeds}, {seconds:.1f} s")


def drawing_pipeline(
    place: Path, kind: str, prompts: list[str], options: tuple[TargetOptions, LoadingOptions, SourceOptions, Plain]
) -> Any:
    """What draws the model in `place`: without torch where that can be."""
    target, loading, source, drawing = options
    asked_for = (loading.device, loading.precision, loading.scheduler, kind, None, loading.variant, loading.runtime)
    load = partial(load_pipeline, place, *asked_for)
    pipeline = None
    if kind == "TextToImagePipeline" and target.filmstrip is None:
        pipeline = light_pipeline(place, loading, prompts, (source, drawing), load)
    if pipeline is None:
        with collector_paused():
            pipeline = load()
            gc.freeze()  # until it has drawn, or Python looks through all of it for cycles at once
    return pipeline


def prepared(
    pipeline: Any,
    options: tuple[LoadingOptions, SourceOptions, GenerateOptions],
    inputs: "SourcePictures",
    used: dict[str, Any],
) -> "Settings":
    """The settings to draw with, once the pipeline has its LoRAs and new words.

    Raises:
        ValueError: it does not draw with them, or has no such class.
    """
    from latentdiff.pipelines.batch.draw import load_adapters, settings_of

    loading, source, drawing = options
    if source.classes:
        pipeline.label_numbers(source.classes)  # those that there are not are refused before anything is drawn
    asked = {**vars(drawing), **used, **loading.adapters(), "variant": loading.variant}
    asked["variation_strength"] = 0.0 if source.variation_seed is None else drawing.variation_strength
    settings = settings_of(pipeline, loading.model, asked, inputs)
    if inputs.image is not None and inputs.image.size != (settings.width, settings.height):
        sizes = "{} x {} pixels and is {} at {} x {}".format(
            *inputs.image.size, "cut" if settings.cut else "redrawn", settings.width, settings.height
        )
        say(f"{source.image} has {sizes}; --width and --height ask for other sizes")
    load_adapters(pipeline, settings.loras, settings.embeddings)
    return settings


PLAIN = {"model", "precision", "runtime", "seed", "height", "width"}
PLAIN |= {"num_inference_steps", "guidance_scale", "negative_prompt"}
"""The options that a drawing without torch takes."""


def light_pipeline(
    place: Path, loading: LoadingOptions, prompts: list[str], others: Sequence[Plain], load: Callable[[], Any]
) -> Any:
    """What draws this without torch, in a part of the time that it takes to load it; None if torch is needed."""
    if loading.runtime is None or not place.is_dir():
        return None
    asked = given_in(loading, *others)
    if not asked.keys() <= PLAIN:
        return None
    from latentdiff.pipelines.runtime.choice import Runtime
    from latentdiff.pipelines.runtime.light.pipeline import TorchNeededError, open_light

    pipeline = open_light(place, Runtime(loading.runtime.value, loading.precision.value), load)
    names = ("height", "width", "num_inference_steps", "negative_prompt", "guidance_scale")
    try:
        if pipeline is not None:
            pipeline.check_request(prompts, *(asked.get(name) for name in names))
    except TorchNeededError:
        return None
    return pipeline


def draw(writer: "PictureWriter", prompts: list[str], count: int, inputs: Any, filmstrip: Path | None) -> None:
    """Draw and write; after Ctrl-C the finished pictures stay, and are listed."""
    try:
        pictures = draw_pictures(writer, inputs, filmstrip)
        if writer.settings.candidates is not None:
            from latentdiff.pipelines.core.candidates import best_of_each

            pictures = best_of_each(pictures, prompts, count, writer.settings, writer.pipeline.device)
        for one in pictures:
            writer.add(one)
        writer.finish()
    except KeyboardInterrupt:
        writer.finish()
        total = len(prompts) * count
        where = f": {files_text(writer.written)}" if writer.written else ""
        say(f"Stopped; {len(writer.drawn)} of {total} pictures were drawn{where}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    for i, one in enumerate(writer.drawn):
        if one.score is not None:
            say(f"{writer.name_of(i)}: CLIP score {one.score:.1f}, seed {writer.seed_of(one)}")
        if one.withheld:
            say(f"{writer.name_of(i)}: withheld by the model's safety checker; it is black", err=True)
        if one.spoilt:
            left = "it is black" if writer.written and len(writer.files) == 1 else "not written"
            say(f"{writer.name_of(i)}: {left}, {NOT_FINITE}", err=True)


def draw_pictures(writer: "PictureWriter", inputs: Any, filmstrip: Path | None) -> Iterator["Drawn"]:
    """All pictures of the writer's batches, each as soon as its batch is finished; or a filmstrip of the only batch."""
    from latentdiff.interchange.png import save_picture
    from latentdiff.pipelines.batch import draw

    for number, batch in enumerate(writer.batches):
        if filmstrip is None:
            drawn = draw.draw_batch(writer.pipeline, writer.settings, batch, inputs, number)
        else:
            strip, drawn = draw.draw_filmstrip(writer.pipeline, writer.settings, batch, inputs, FRAMES)
            if not all(one.spoilt for one in drawn):
                save_picture(strip, filmstrip, writer.record(drawn, filmstrip=FRAMES).dump())
        yield from drawn


def check_request(prompts: list[str], count: int, source: SourceOptions, drawing: GenerateOptions) -> None:
    """Raises ValueError for what cannot be meant; nothing is loaded for it."""
    image, mask, candidates = source.image, source.mask, drawing.candidates
    check_prompts(prompts)
    for file in (image, mask):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{file}: {'is a folder, not a picture' if file.is_dir() else 'no such file'}")
    mixed = given_in(drawing).get("variation_strength")
    for flag, given, needed, what in (
        ("mask", mask, image, "image, the picture to start from"),
        ("strength", drawing.strength, image, "image, the picture to start from"),
        ("variation-strength", mixed, source.variation_seed, "variation-seed, of the noise that is mixed in"),
    ):
        if given is not None and needed is None:
            raise ValueError(f"--{flag} needs --{what}")
    if (candidates is None) != (drawing.reranker is None):
        raise ValueError("--candidates and --clip go together: how many to draw, and what compares them")
    if candidates is not None and candidates < count:
        raise ValueError(f"--candidates {candidates} are fewer than the {count} pictures of --count to keep")


def check_prompts(prompts: list[str]) -> None:
    """Raises ValueError for what is no prompt; says so if several words look like one."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError('the prompt is empty; say what to draw, for instance "a red car"')
        if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"the prompt {prompt!r} is not text in this terminal's encoding")
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        say(f'Drawing {len(prompts)} prompts; for one prompt of several words write "{" ".join(prompts)}"')


def files_of(target: TargetOptions, prompt: str, total: int, candidates: int | None) -> list[Path]:
    """The files to write: one for each picture, or one for all.

    Raises:
        ValueError, FileExistsError: an output cannot or must not be written.
    """
    from latentdiff.interchange.png import check_output

    slug = re.sub(r"[^\w]+", "-", prompt.strip().lower()).strip("-")[:60] or "picture"
    if max(total, candidates or 0) > 2**20:
        raise ValueError(
            f"{max(total, candidates or 0)} pictures are too many for one command; draw fewer, or use many"
        )
    output, filmstrip = target.output or Path(f"{slug}.png"), target.filmstrip
    files = [output]
    if target.separate and total > 1:
        files = [output.with_stem(f"{output.stem}-{i + 1:0{len(str(total))}d}") for i in range(total)]
    elif total > MOST:
        raise ValueError(f"{total} pictures are too many for one grid, {MOST} are the most; say --separate")
    for file in files if filmstrip is None else [*files, filmstrip]:
        check_output(file, target.overwrite)
    if filmstrip in files:
        raise ValueError(f"{filmstrip}: the filmstrip needs a file of its own")
    if filmstrip is not None and (total > BATCH or candidates is not None):
        raise ValueError(f"--filmstrip shows up to {BATCH} pictures, and no candidates; draw fewer")
    return files


def pipeline_kind(place: Path, image: object, mask: object) -> str:
    """The class that draws with the model in `place` from what is given of the two; or without text and pictures."""
    pictures = [name for name, given in (("image", image), ("mask_image", mask)) if given is not None]
    return kind_in(place, pictures, textless=True, shown=FLAGS).name


def files_text(files: list[Path]) -> str:
    return ", ".join(map(str, files)) if len(files) <= 4 else f"{files[0]} to {files[-1]}"


def seeds_text(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"
