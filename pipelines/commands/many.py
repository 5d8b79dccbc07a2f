"""``latentdiff many``."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from latentdiff.imports import load_module
from latentdiff.pipelines.batch.drawing_options import BATCH, DrawingOptions, RefinedOptions
from latentdiff.pipelines.commands.kind_options import check_taken, check_words
from latentdiff.pipelines.commands.model_options import (
    FAILED,
    INTERRUPTED,
    Device,
    LoadingOptions,
    be_quiet,
    check_runtime,
    grouped,
    load_pipeline,
    pick_device,
)
from latentdiff.pipelines.commands.refiner import find_refiner
from latentdiff.pipelines.registry import Kind, kind_in
from latentdiff.pipelines.storage.places import find_place
from latentdiff.terminal import say

if TYPE_CHECKING:
    from latentdiff.pipelines.batch.many import Report
    from latentdiff.pipelines.batch.prompt_files import Prompt

SHOWN = 20  # failures


@grouped
def many(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures and their metadata.jsonl.")],
    loading: LoadingOptions,
    drawing: RefinedOptions,
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="A .txt with a prompt or class a line, or a .jsonl or .csv with a column 'prompt' or 'class'."
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Class to draw, in place of a file; may be repeated."),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, help="Pictures of each prompt or class; or in all.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Picture i is drawn with SEED + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once; takes memory.")] = BATCH,
) -> None:
    """Draw many prompts into a folder; or many pictures of classes, or of whatever a model without text was trained on.

    latentdiff many prompts.txt -o pictures

    accelerate launch -m latentdiff many prompts.txt -o pictures

    latentdiff many --model runs/birds --class owl --class robin -n 500 -o owls

    A table's columns: prompt, seed, negative_prompt, guidance_scale, num_inference_steps, height, width, file_name.

    Repeat the command to go on where it stopped: what is missing, or was drawn with other settings, is drawn.
    """
    from latentdiff.pipelines.batch.prompt_files import name_files, read_prompts, several_of_each

    rows = None if prompts is None else read_prompts(prompts)
    model, variant = loading.model, loading.variant
    place = find_place(model, variant)
    check_runtime(loading.runtime, place, loading.device, loading.precision)
    kind = kind_in(place, textless=True)
    rows = several_of_each(check_rows(kind, rows, classes, loading, drawing), count)
    name_files(rows)
    refiner, drawing = find_refiner(drawing, variant)

    from latentdiff.interchange.fingerprint import digest_in_background

    digest = digest_in_background(place, variant)
    started = time.perf_counter()
    load_module("latentdiff.pipelines.batch.draw")
    from latentdiff.pipelines.batch.draw import load_adapters
    from latentdiff.pipelines.batch.many import draw_many
    from latentdiff.pipelines.distributed import drawing_processes

    pick_device(loading.device)  # a wrong one is named before processes are connected
    state = drawing_processes(cpu=loading.device is Device.cpu)
    own = None if state is None else str(state.device)
    adapters = loading.adapters()
    with Watch(output) as watch:
        named = {"model": model, "model_digest": digest.result(), "variant": variant}
        named["refiner_digest"] = None if refiner is None else refiner.digest.result()
        options = {"seed": seed, **named, **vars(drawing), **adapters}
        pipeline = finished_outline(place, kind, loading, rows, output, options)
        if pipeline is None:
            where = (loading.device, loading.precision, loading.scheduler, kind.name, own, variant, loading.runtime)
            pipeline = load_pipeline(place, *where)
            pipeline.set_progress_bar_config(disable=True)
            if kind.conditioned_by == "class":
                pipeline.label_numbers([row.prompt for row in rows])  # none may be unknown
            load_adapters(pipeline, adapters["loras"], adapters["embeddings"])
            if refiner is not None:
                refiner.join(pipeline, loading.device, loading.precision, loading.scheduler, own)
        report = draw_many(pipeline, rows, output, batch_size=batch_size, progress=watch, **options)
    if state is not None:
        state.destroy_process_group()
    if state is None or state.is_main_process:
        print_report(report, time.perf_counter() - started)
    if report.failed:
        raise typer.Exit(FAILED)


def check_rows(
    kind: Kind,
    rows: "list[Prompt] | None",
    classes: list[str] | None,
    loading: LoadingOptions,
    drawing: DrawingOptions,
) -> "list[Prompt]":
    """What to draw, once: the rows of a file, or classes, or whatever the model draws.

    Raises:
        ValueError, BadParameter: this kind of model draws from something else.
    """
    from latentdiff.pipelines.batch.prompt_files import Prompt

    if rows is not None and classes:
        raise ValueError("--class and a file of prompts: give one of the two")
    if kind.conditioned_by not in ("class", "none"):
        check_taken(kind.name, loading, drawing)
        if rows is None:
            raise typer.BadParameter("give a file of prompts, .txt, .jsonl or .csv", param_hint="PROMPTS")
        return rows
    if rows is not None and kind.conditioned_by == "none":
        raise ValueError(
            f"the model {loading.model} does not draw from words; leave the file out, and say with -n how many to draw"
        )
    check_words(kind.name, [], classes or [row.prompt for row in rows or ()], loading, drawing)
    return [Prompt.model_validate({"prompt": name}) for name in classes or [""]] if rows is None else rows


def finished_outline(
    place: Path, kind: Kind, loading: LoadingOptions, rows: "list[Prompt]", output: Path, options: dict[str, Any]
) -> Any:
    """The pipeline without its weights, if there is nothing left to draw with it; else None.

    options: of `draw_many`.
    """
    if place.is_file() or not output.is_dir() or loading.runtime is not None:
        return None
    import torch

    from latentdiff.pipelines.batch.many import is_drawn
    from latentdiff.pipelines.batch.outline import outline
    from latentdiff.pipelines.core.scheduler_names import change_scheduler

    be_quiet()
    try:
        pipeline = outline(place, kind, getattr(torch, loading.precision.value))
        if loading.scheduler is not None:
            pipeline.scheduler = change_scheduler(pipeline.scheduler, loading.scheduler)
    except (OSError, ValueError, TypeError, NotImplementedError, RuntimeError):
        return None  # the pipeline itself, when it is loaded, says what is wrong
    return pipeline if is_drawn(pipeline, rows, output, **options) else None


class Watch:
    """A progress bar; after an interruption it reports how far this process came."""

    def __init__(self, output: Path) -> None:
        from tqdm import tqdm

        self.output, self.done, self.total = output, 0, 0
        hidden = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
        self.bar = tqdm(unit="picture", disable=hidden)

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.done)
        self.done, self.total = done, total

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.bar.close()
        if kind is KeyboardInterrupt:
            of = f" of {self.total}" if self.total else ""
            say(f"Stopped; {self.done}{of} pictures were drawn in {self.output}. Repeat the command to go on", err=True)
            raise typer.Exit(INTERRUPTED)


def print_report(report: "Report", seconds: float) -> None:
    """What was drawn, and what was not."""
    for name in report.withheld:
        say(f"{report.folder / name}: withheld by the model's safety checker; it is black", err=True)
    for name, why in list(report.failed.items())[:SHOWN]:
        say(f"{report.folder / name}: not drawn: {why}", err=True)
    if len(report.failed) > SHOWN:
        say(f"and {len(report.failed) - SHOWN} more", err=True)
    counts = [f"{len(report.drawn)} drawn", f"{len(report.kept)} there already", f"{len(report.failed)} failed"]
    say(f"{report.folder}: {', '.join(counts)}, {seconds:.1f} s")
