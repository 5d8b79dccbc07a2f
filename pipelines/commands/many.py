"""``latentdiff many``."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from latentdiff.pipelines.batch.drawing_options import BATCH, DrawingOptions
from latentdiff.pipelines.commands.options import (
    FAILED,
    INTERRUPTED,
    Device,
    LoadingOptions,
    find_place,
    grouped,
    load_pipeline,
    pick_device,
)
from latentdiff.pipelines.registry import kind_in
from latentdiff.terminal import say

if TYPE_CHECKING:
    from latentdiff.pipelines.batch.many import Report

SHOWN = 20  # failures


@grouped
def many(
    prompts: Annotated[
        Path, typer.Argument(help="A .txt with one prompt a line, or a .jsonl or .csv with a column 'prompt'.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures and their metadata.jsonl.")],
    loading: LoadingOptions,
    drawing: DrawingOptions,
    seed: Annotated[int, typer.Option(min=0, help="Picture i is drawn with SEED + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once; takes memory.")] = BATCH,
) -> None:
    """Draw many prompts into a folder.

    latentdiff many prompts.txt -o pictures

    accelerate launch -m latentdiff many prompts.txt -o pictures

    A table's columns: prompt, seed, negative_prompt, guidance_scale, num_inference_steps, height, width, file_name.

    Repeat the command to go on where it stopped: what is missing, or was drawn with other settings, is drawn.
    """
    from latentdiff.pipelines.batch.prompt_files import name_files, read_prompts

    rows = read_prompts(prompts)
    name_files(rows)
    model, variant = loading.model, loading.variant
    place = find_place(model, variant)

    from latentdiff.interchange.fingerprint import digest_in_background

    digest = digest_in_background(place, variant)
    started = time.perf_counter()
    from latentdiff.pipelines.batch.draw import load_adapters
    from latentdiff.pipelines.batch.many import draw_many
    from latentdiff.pipelines.distributed import drawing_processes

    pick_device(loading.device)  # a wrong one is named before processes are connected
    state = drawing_processes(cpu=loading.device is Device.cpu)
    own = None if state is None else str(state.device)
    kind = kind_in(place).name
    pipeline: Any = load_pipeline(place, loading.device, loading.precision, loading.scheduler, kind, own, variant)
    pipeline.set_progress_bar_config(disable=True)
    adapters = loading.adapters()
    load_adapters(pipeline, adapters["loras"], adapters["embeddings"])
    with Watch(output) as watch:
        report = draw_many(
            pipeline,
            rows,
            output,
            seed=seed,
            batch_size=batch_size,
            model=model,
            model_digest=digest.result(),
            variant=variant,
            progress=watch,
            **vars(drawing),
            **adapters,
        )
    if state is not None:
        state.destroy_process_group()
    if state is None or state.is_main_process:
        print_report(report, time.perf_counter() - started)
    if report.failed:
        raise typer.Exit(FAILED)


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
