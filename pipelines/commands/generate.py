"""``latentdiff generate``."""

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.pipelines.commands.options import (
    BATCH,
    INTERRUPTED,
    Device,
    DeviceOption,
    EmbeddingOption,
    GuidanceOption,
    HeightOption,
    IntervalOption,
    LongOption,
    LongPrompts,
    LoraOption,
    ModelOption,
    NegativeOption,
    Precision,
    PrecisionOption,
    RescaleOption,
    SchedulerOption,
    StepsOption,
    VariantOption,
    WeightsOption,
    WidthOption,
    find_place,
    load_pipeline,
    read_embeddings,
    read_loras,
)
from latentdiff.pipelines.registry import kind_taking

if TYPE_CHECKING:
    from latentdiff.pipelines.commands.drawing import Writer

FRAMES = 8  # of a filmstrip
MOST = 4096  # pictures in a grid


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw, in quotes.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG file to write; by default named after the prompt.")
    ] = None,
    model: ModelOption = "emoji",
    variant: VariantOption = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures for each prompt, in one grid.")] = 1,
    height: HeightOption = None,
    width: WidthOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    guidance_rescale: RescaleOption = 0.0,
    guidance_interval: IntervalOption = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Picture i is drawn with SEED + i; by default a random one, shown.")
    ] = None,
    variation_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Draw variations of the picture of SEED: picture i mixes in VARIATION_SEED + i."),
    ] = None,
    variation_strength: Annotated[
        float, typer.Option(min=0, max=1, help="How much of the noise of VARIATION_SEED is mixed in.")
    ] = 0.1,
    negative_prompt: NegativeOption = None,
    prompt_weights: WeightsOption = False,
    long_prompts: LongOption = LongPrompts.cut,
    image: Annotated[Path | None, typer.Option(help="Picture to start from.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="How much of it is drawn anew: 0.8 by default, and all (1) of what a mask covers."
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where to paint in the picture of --image, and as large.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Draw so many of each prompt and keep those that fit it best; see --clip.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="What compares candidates: folder of a CLIP, owner/name, or open_clip:MODEL/WEIGHTS."),
    ] = None,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    scheduler: SchedulerOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
    separate: Annotated[bool, typer.Option("--separate", help="One file for each picture instead of a grid.")] = False,
    filmstrip: Annotated[
        Path | None, typer.Option(help="Show how the pictures came to be, step by step, in this PNG file.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file even if this program did not write it.")
    ] = False,
) -> None:
    """Draw pictures from words.

    latentdiff generate "a red car" -o car.png

    latentdiff generate "a red car" --image sketch.png --strength 0.7

    The file keeps prompt, seed, settings and the model's digest; `latentdiff replay` draws it again.

    A picture drawn earlier by this program is replaced, other files are not.
    """
    total = len(prompts) * count
    check_request(prompts, count, image, mask, strength, candidates, clip)
    output = output or Path(f"{slug(prompts[0])}.png")
    files = numbered(output, total) if separate and total > 1 else [output]
    check_files(files, filmstrip, overwrite, candidates, total)
    place = find_place(model, variant)

    from latentdiff.interchange.fingerprint import digest_in_background

    digest = digest_in_background(place, variant)
    started = time.perf_counter()
    from latentdiff import __version__
    from latentdiff.pipelines.batch.drawing import load_adapters, read_inputs
    from latentdiff.pipelines.batch.settings import Settings
    from latentdiff.pipelines.commands.drawing import Writer, plan_batches

    inputs, used = read_inputs(image, mask)
    pipeline = load_pipeline(place, device, precision, scheduler, pipeline_kind(image, mask), variant=variant)
    settings = Settings(
        negative_prompt=negative_prompt,
        num_inference_steps=steps or pipeline.defaults["num_inference_steps"],
        guidance_scale=pipeline.defaults["guidance_scale"] if guidance is None else guidance,
        guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval,
        variation_strength=0.0 if variation_seed is None else variation_strength,
        prompt_weights=prompt_weights,
        long_prompts=long_prompts.value,
        strength=usual_strength(image, mask, strength),
        candidates=candidates,
        reranker=clip,
        model=model,
        variant=variant,
        loras=read_loras(lora),
        embeddings=read_embeddings(embedding),
        scheduler=type(pipeline.scheduler).__name__,
        precision=precision.value,
        version=__version__,
        **used,
        **picture_size(pipeline, inputs.image, width, height),
    )
    load_adapters(pipeline, settings.loras, settings.embeddings)
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    writer = Writer(
        pipeline,
        settings,
        plan_batches(prompts, candidates or count, seed, variation_seed),
        files,
        columns=count if len(prompts) > 1 and count > 1 else round_up_root(total),
        digest=digest.result,
    )
    draw(writer, prompts, count, inputs, filmstrip)
    seeds = seeds_text([writer.seed_of(one) for one in writer.drawn])
    if variation_seed is not None:
        seeds = f"seed {seed}, variation {seeds}"
    typer.echo(f"{files_text(files)}: {seeds}, {time.perf_counter() - started:.1f} s")


def draw(writer: "Writer", prompts: list[str], count: int, inputs: Any, filmstrip: Path | None) -> None:
    """Draw and write; a Ctrl-C leaves what is finished, and says what that is."""
    from latentdiff.pipelines.commands.drawing import best_of_each, draw_all, draw_with_filmstrip

    try:
        pictures = draw_all(writer.pipeline, writer.settings, writer.batches, inputs)
        if filmstrip is not None:
            pictures = iter(draw_with_filmstrip(writer, inputs, filmstrip, FRAMES))
        if writer.settings.candidates is not None:
            pictures = best_of_each(pictures, prompts, count, writer.settings, writer.pipeline.device)
        for one in pictures:
            writer.add(one)
        writer.finish()
        writer.report()
    except KeyboardInterrupt:
        writer.finish()
        total = len(prompts) * count
        where = f": {files_text(writer.written)}" if writer.written else ""
        typer.echo(f"Stopped; {len(writer.drawn)} of {total} pictures were drawn{where}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def check_request(
    prompts: list[str],
    count: int,
    image: Path | None,
    mask: Path | None,
    strength: float | None,
    candidates: int | None,
    clip: str | None,
) -> None:
    """Raises ValueError for what cannot be meant; nothing is loaded for it."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError('the prompt is empty; say what to draw, for instance "a red car"')
        if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"the prompt {prompt!r} is not text in this terminal's encoding")
    for file in (image, mask):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{file}: {'is a folder, not a picture' if file.is_dir() else 'no such file'}")
    if image is None and (mask is not None or strength is not None):
        raise ValueError(f"--{'mask' if mask else 'strength'} needs --image, the picture to start from")
    if (candidates is None) != (clip is None):
        raise ValueError("--candidates and --clip go together: how many to draw, and what compares them")
    if candidates is not None and candidates < count:
        raise ValueError(f"--candidates {candidates} are fewer than the {count} pictures of --count to keep")
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        typer.echo(f'Drawing {len(prompts)} prompts; for one prompt of several words write "{" ".join(prompts)}"')


def check_files(files: list[Path], filmstrip: Path | None, overwrite: bool, candidates: int | None, total: int) -> None:
    """Raises ValueError or FileExistsError for an output that cannot or must not be written."""
    from latentdiff.interchange.png import check_output

    if total > MOST and len(files) == 1:
        raise ValueError(f"{total} pictures are too many for one grid, {MOST} are the most; say --separate")
    for file in files if filmstrip is None else [*files, filmstrip]:
        check_output(file, overwrite)
    if filmstrip is None:
        return
    if filmstrip in files:
        raise ValueError(f"{filmstrip}: the filmstrip needs a file of its own")
    if total > BATCH or candidates is not None:
        raise ValueError(f"--filmstrip shows up to {BATCH} pictures, and no candidates; draw fewer")


def pipeline_kind(image: object, mask: object) -> str:
    """The class that draws from what is given of the two."""
    return kind_taking(name for name, given in (("image", image), ("mask_image", mask)) if given is not None).name


def usual_strength(image: Path | None, mask: Path | None, strength: float | None) -> float | None:
    """Of a call that starts from a picture, by default that of the pipelines."""
    if image is None or strength is not None:
        return strength
    return 0.8 if mask is None else 1.0


def picture_size(pipeline: Any, image: Any, width: int | None, height: int | None) -> dict[str, Any]:
    """Width and height of what is drawn."""
    if image is not None and None in (width, height):
        from latentdiff.pipelines.batch.drawing import input_size

        usual = pipeline.picture_size(None, None)[::-1]
        width, height = input_size(image, width, height, usual, pipeline.vae_scale_factor)
    height, width = pipeline.picture_size(height, width)
    return {"width": width, "height": height}


def slug(prompt: str) -> str:
    """A file name from a prompt."""
    return re.sub(r"[^\w]+", "-", prompt.strip().lower()).strip("-")[:60] or "picture"


def numbered(output: Path, total: int) -> list[Path]:
    return [output.with_stem(f"{output.stem}-{i + 1:0{len(str(total))}d}") for i in range(total)]


def round_up_root(total: int) -> int:
    return next(n for n in range(1, total + 1) if n * n >= total)


def files_text(files: list[Path]) -> str:
    return ", ".join(map(str, files)) if len(files) <= 4 else f"{files[0]} to {files[-1]}"


def seeds_text(seeds: list[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"
