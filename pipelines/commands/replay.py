"""``latentdiff replay``."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff import __version__
from latentdiff.imports import load_module
from latentdiff.pipelines.commands.generate import pipeline_kind
from latentdiff.pipelines.commands.model_options import Device, Precision, devices_here, load_pipeline
from latentdiff.pipelines.commands.refiner import Refiner
from latentdiff.pipelines.storage.places import find_place
from latentdiff.terminal import say

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.pipelines.batch.record import Machine, Record

DIFFERENT = 1  # exit status


def replay(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="PNG file drawn by latentdiff.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="PNG file for the new picture.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model is now; by default as the picture says.")
    ] = None,
    refiner: Annotated[
        str | None, typer.Option(help="Where the refiner is now; by default as the picture says.")
    ] = None,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Go on with a model that is not the one it was drawn with.")
    ] = False,
    device: Annotated[Device | None, typer.Option(help="Where to compute; by default as it was drawn.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on the CPU; by default as many as it was drawn with.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file even if this program did not write it.")
    ] = False,
) -> None:
    """Draw a picture again from what its file says, and compare.

    latentdiff replay car.png

    The exit status is 0 if all pixels are equal, and 1 if not.
    """
    from latentdiff.interchange.fingerprint import digest_in_background
    from latentdiff.interchange.png import check_output, save_picture
    from latentdiff.pipelines.batch.record import read_record

    before, record = read_record(picture)
    if output is not None:
        check_output(output, overwrite)
        if output.exists() and output.samefile(picture):
            raise ValueError(f"{output} is the picture itself; choose another name for the new one")
    elif overwrite:
        raise ValueError("--overwrite needs --output, the file for the new picture")
    if refiner is not None and record.refiner is None:
        raise ValueError(f"--refiner: {picture} was drawn without one; leave it out")
    place = find_model_of(record, model)
    digest = digest_in_background(place, record.variant)

    started = time.perf_counter()
    load_module("latentdiff.pipelines.batch.draw")
    import torch

    from latentdiff.pipelines.batch.draw import find_used, load_adapters, read_inputs, redraw, this_machine
    from latentdiff.pipelines.core.scheduler_names import change_scheduler

    named = [None if used is None else find_used(used, picture.parent) for used in (record.image, record.mask)]
    inputs, _ = read_inputs(*named)
    most = 4 * (os.cpu_count() or 1)  # a file may say anything
    torch.set_num_threads(threads or min(record.machine.threads, most))  # how sums are divided changes them
    if device is None:
        then = record.machine.device
        device = Device(then) if then in devices_here() else Device.auto
    precision = Precision(record.precision)
    kind = pipeline_kind(place, record.image, record.mask)
    pipeline: Any = load_pipeline(place, device, precision, None, kind, None, record.variant, record.runtime)
    found = check_model(record, picture, pipeline, place, digest.result(), any_model)
    if type(pipeline.scheduler).__name__ != record.scheduler:
        pipeline.scheduler = change_scheduler(pipeline.scheduler, record.scheduler)
    load_adapters(pipeline, record.loras, record.embeddings, picture.parent)
    if record.refiner is not None:
        refiner_of(record, picture, refiner, any_model).join(pipeline, device, precision)
    after = redraw(pipeline, record, inputs)
    machine = this_machine(pipeline)
    if output is not None:
        new = {"model_digest": found, "machine": machine, "version": __version__}
        save_picture(after, output, record.model_copy(update=new).dump())
    different = difference(before, after)
    where = f"{output}, {picture}" if output else str(picture)
    took = f"{time.perf_counter() - started:.1f} s"
    if different is None:
        say(f"{where}: equal, {took}")
        return
    say(f"{where}: {different}, {took}. {reasons(record, machine, found)}")
    raise typer.Exit(DIFFERENT)


def find_model_of(record: "Record", model: str | None) -> Path:
    """Where the model is. What only the picture names is not fetched from the hub: anybody may have made it."""
    try:
        return find_place(model or record.model, record.variant, fetch=model is not None)
    except OSError as error:
        if model is not None:
            raise
        raise FileNotFoundError(
            f"the model {record.model!r}, with which this picture was drawn, is not here; say with --model where it "
            f"is, a folder or owner/name on the hub"
        ) from error


def refiner_of(record: "Record", picture: Path, named: str | None, any_model: bool) -> Refiner:
    """What drew the last steps. Raises FileNotFoundError, ValueError as for the model."""
    name = named or str(record.refiner)
    try:
        place = find_place(name, record.variant, fetch=named is not None)
    except OSError as error:
        raise FileNotFoundError(
            f"the refiner {name!r}, with which this picture was drawn, is not here; say with --refiner where it is"
        ) from error
    refiner = Refiner.at(name, place, record.variant)
    if refiner.digest.result() != record.refiner_digest and not any_model:
        raise ValueError(
            f"{picture} was drawn with another refiner than {name!r} is now; say with --refiner where the right one "
            f"is, or go on with --any-model"
        )
    return refiner


def check_model(record: "Record", picture: Path, pipeline: Any, place: Path, digest: str, any_model: bool) -> str:
    """The digest of the model at hand, of the kind that the record has.

    Args:
        place, digest: of the model; older records name every single file by its own content.

    Raises:
        ValueError: it is another one, and that is not wanted.
    """
    from latentdiff.interchange.fingerprint import file_digest

    expected = record.model_digest or ""
    if expected.startswith("weights:"):
        from latentdiff.pipelines.batch.many import digest_of_weights

        digest = digest_of_weights(pipeline)
    elif digest != expected and place.is_file() and file_digest(place) == expected:
        digest = expected
    if digest != expected and not any_model:
        was = f"with digest {expected[:16]}..." if expected else "whose digest is not known"
        raise ValueError(
            f"{picture} was drawn with another model, {record.model!r} {was}; the one here has {digest[:16]}...; say "
            f"with --model where the right one is, or go on with --any-model"
        )
    return digest


def difference(before: "Image.Image", after: "Image.Image") -> str | None:
    """How two pictures differ; None if they do not."""
    import numpy as np

    if before.size != after.size:
        return "the file has {} x {} pixels and the new picture {} x {}".format(*before.size, *after.size)
    apart = np.abs(np.asarray(before.convert("RGB"), dtype=int) - np.asarray(after, dtype=int)).max(axis=-1)
    count = int((apart > 0).sum())
    return f"{count} of {apart.size} pixels differ, by at most {apart.max()} of 255" if count else None


def reasons(record: "Record", machine: "Machine", digest: str) -> str:
    """What was otherwise when the picture was drawn."""
    names = {"device": "device", "processor": "processor", "threads": "number of threads", "torch": "torch"}
    pairs = [(name, getattr(record.machine, key), getattr(machine, key)) for key, name in names.items()]
    pairs.append(("latentdiff", record.version, __version__))
    pairs.append(("model", (record.model_digest or "")[:16], digest[:16]))
    found = [f"{name} ({then} then, {now} now)" for name, then, now in pairs if then != now]
    if not found:
        return "Nothing that is known was otherwise then; maybe the file was changed, or another library was."
    return f"Otherwise then: {', '.join(found)}."
