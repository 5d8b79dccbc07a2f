"""The command line: ``latentdiff generate``, and ``latentdiff train`` from `latentdiff.training.cli`."""

import os
import re
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from latentdiff.pipelines import TextToImagePipeline

USER_MISTAKES = (ValueError, TypeError, OSError, NotImplementedError)
BATCH = 8  # images drawn at once; each has its own seed, so this changes memory and speed only

app = typer.Typer(
    name="latentdiff",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Latent text-to-image diffusion: draw pictures from words, and train models that do.",
)


class Precision(StrEnum):
    """Of weights and computation."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"latentdiff {installed_version()}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the program an error comes from.", envvar="LATENTDIFF_DEBUG")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    if debug:
        os.environ["LATENTDIFF_DEBUG"] = "1"


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw, in quotes.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file to write; by default named after the prompt.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A packaged model, a pipeline folder, or owner/name on the hub.")
    ] = "emoji",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures for each prompt, in one grid.")] = 1,
    height: Annotated[int | None, typer.Option(help="In pixels; by default as the model was trained.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; by default as the model was trained.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; by default the model's.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How strongly to follow the prompt, 1 and up; by default the model's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Picture i is drawn with SEED + i; by default a random one, shown.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Sampler, such as ddim, dpm++, euler or unipc; by default the model's.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU if there is one.")] = Device.auto,
    precision: Annotated[Precision, typer.Option(help="Of weights and computation.")] = Precision.float32,
    separate: Annotated[bool, typer.Option("--separate", help="One file for each picture instead of a grid.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file even if this program did not write it.")
    ] = False,
) -> None:
    """Draw pictures from words.

    latentdiff generate "a red car" -o car.png

    The file keeps prompt, seed, settings and model. A picture drawn earlier by this program is replaced, other files
    are not.
    """
    from latentdiff.interchange.png import check_output, image_grid, save_picture

    for prompt in prompts:
        if not prompt.strip():
            raise ValueError('the prompt is empty; say what to draw, for instance "a red car"')
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        typer.echo(f'Drawing {len(prompts)} prompts; for one prompt of several words write "{" ".join(prompts)}"')
    total = len(prompts) * count
    output = output or Path(f"{slug(prompts[0])}.png")
    files = numbered(output, total) if separate and total > 1 else [output]
    for file in files:
        check_output(file, overwrite)

    started = time.perf_counter()
    pipeline = load_pipeline(model, device, precision, scheduler)
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    settings: dict[str, Any] = {
        "prompts": prompts,
        "count": count,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps or pipeline.defaults["num_inference_steps"],
        "guidance_scale": pipeline.defaults["guidance_scale"] if guidance is None else guidance,
        "model": model,
        "scheduler": type(pipeline.scheduler).__name__,
        "precision": precision.value,
    }
    images = draw(pipeline, settings, height, width)
    settings |= {"width": images[0].width, "height": images[0].height, "version": installed_version()}

    if len(files) > 1:
        for i, (image, file) in enumerate(zip(images, files, strict=True)):
            save_picture(image, file, {**settings, "prompts": [prompts[i // count]], "count": 1, "seed": seed + i})
    else:
        columns = count if len(prompts) > 1 and count > 1 else round_up_root(total)
        save_picture(image_grid(images, columns) if total > 1 else images[0], files[0], settings)
    seeds = f"seed {seed}" if total == 1 else f"seeds {seed} to {seed + total - 1}"
    typer.echo(f"{', '.join(map(str, files))}: {seeds}, {time.perf_counter() - started:.1f} s")


def load_pipeline(model: str, device: Device, precision: Precision, scheduler: str | None) -> "TextToImagePipeline":
    """The pipeline to draw with, on its device."""
    from latentdiff.interchange.folders import find_model
    from latentdiff.pipelines.schedulers import change_scheduler, find_scheduler

    find_model(model)  # what can be told quickly is told before torch is loaded
    if scheduler is not None:
        find_scheduler(scheduler)

    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from latentdiff.pipelines import TextToImagePipeline

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = TextToImagePipeline.from_pretrained(model, dtype=getattr(torch, precision.value))
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    if scheduler is not None:
        pipeline.scheduler = change_scheduler(pipeline.scheduler, scheduler)
    return pipeline.to(pick_device(device))


def pick_device(device: Device) -> str:
    """Raises ValueError if there is no such device here."""
    import torch

    have = {Device.cuda: torch.cuda.is_available(), Device.mps: torch.backends.mps.is_available(), Device.cpu: True}
    if device is Device.auto:
        return next(one for one, there in have.items() if there).value
    if not have[device]:
        raise ValueError(f"this machine has no {device.value} device; leave --device out, or say --device cpu")
    return device.value


def draw(pipeline: "TextToImagePipeline", settings: dict[str, Any], height: int | None, width: int | None) -> list[Any]:
    """All pictures that `settings` ask for, a few at a time."""
    prompts = [prompt for prompt in settings["prompts"] for _ in range(settings["count"])]
    images: list[Any] = []
    for i in range(0, len(prompts), BATCH):
        output = pipeline(
            prompts[i : i + BATCH],
            height=height,
            width=width,
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            negative_prompt=settings["negative_prompt"],
            seed=settings["seed"] + i,
            return_dict=False,
        )
        images += output[0]
    return images


def slug(prompt: str) -> str:
    """A file name from a prompt."""
    return re.sub(r"[^\w]+", "-", prompt.strip().lower()).strip("-")[:60] or "picture"


def numbered(output: Path, total: int) -> list[Path]:
    return [output.with_stem(f"{output.stem}-{i + 1:0{len(str(total))}d}") for i in range(total)]


def round_up_root(total: int) -> int:
    return next(n for n in range(1, total + 1) if n * n >= total)


def installed_version() -> str:
    from latentdiff import __version__

    return __version__


def run(application: typer.Typer) -> None:
    """Run a command-line application; what the user can mend is said without a traceback, with exit status 2."""
    try:
        application()
    except Exception as error:
        if os.environ.get("LATENTDIFF_DEBUG", "0") not in ("", "0"):
            raise
        mistake = isinstance(error, USER_MISTAKES)
        what = str(error) or type(error).__name__
        typer.echo(f"Error: {what}" if mistake else f"Error: {type(error).__name__}: {what}", err=True)
        if not mistake:
            typer.echo("This may be a fault of the program; LATENTDIFF_DEBUG=1 shows where.", err=True)
        sys.exit(2 if mistake else 1)


def main() -> None:
    """The ``latentdiff`` command."""
    from latentdiff.training.cli import add_commands

    add_commands(app)
    run(app)


if __name__ == "__main__":
    main()
