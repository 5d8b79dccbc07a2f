"""What the commands share: options, and the pipeline that they ask for."""

import inspect
import math
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from annotated_types import Ge, Le
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from typer.models import OptionInfo

from latentdiff.imports import collector_paused
from latentdiff.pipelines.batch.drawing_options import Option, Plain, first_problem
from latentdiff.pipelines.registry import find_kind
from latentdiff.pipelines.storage.places import local_place, open_place

if TYPE_CHECKING:
    from latentdiff.pipelines.tasks.text_to_image import TextPipeline


FAILED = 1  # exit status
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


class Precision(StrEnum):
    """Of weights and computation."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


class RuntimeName(StrEnum):
    """What runs the networks instead of torch."""

    openvino = "openvino"
    onnx = "onnx"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU if there is one.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of weights and computation; int8 needs a runtime.")]


class LoadingOptions(Plain):
    """Which model to draw with, and where."""

    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="A packaged model, a pipeline folder, a .safetensors file, or owner/name on the hub."
        ),
    ] = "emoji"
    variant: str | None = Field(None, description="Weight files to take where the folder has them, such as fp16.")
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="FILE[:SCALE]", help="LoRA to load; may be repeated.")
    ] = None
    embedding: Annotated[
        list[str] | None,
        typer.Option(
            "--embedding", metavar="FILE[:WORD]", help="New word to load (textual inversion); may be repeated."
        ),
    ] = None
    scheduler: str | None = Field(None, description="Sampler: ddim, dpm++, euler, unipc ...; by default the model's.")
    device: DeviceOption = Device.auto
    precision: PrecisionOption = Precision.float32
    runtime: RuntimeName | None = Field(
        None, description="Runs the networks on the processor instead of torch, faster; graphs are made once and kept."
    )

    def adapters(self) -> dict[str, list[Any]]:
        """The LoRAs and embeddings as a record names them; a folder or a model on the hub stands for the file in it.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or it cannot be one.
        """
        if not self.lora and not self.embedding:
            return {"loras": [], "embeddings": []}
        from latentdiff.interchange.adapter_files import EMBEDDING_NAMES, LORA_NAMES, find_adapter
        from latentdiff.interchange.fingerprint import file_digest
        from latentdiff.pipelines.batch.record import Embedding, Lora

        loras, embeddings = [], []
        for argument in self.lora or []:
            source, scale = split_last(argument)
            try:
                strength = 1.0 if scale is None else float(scale)
            except ValueError:
                source, strength = argument, 1.0
            if not math.isfinite(strength):
                raise ValueError(f"--lora {argument}: the scale must be a finite number, not {scale}")
            file = find_adapter(source, LORA_NAMES)
            loras.append(Lora(file=str(file), sha256=file_digest(file), scale=strength))
        for argument in self.embedding or []:
            source, word = split_last(argument)
            file = find_adapter(source, EMBEDDING_NAMES)
            embeddings.append(Embedding(file=str(file), sha256=file_digest(file), word=word))
        return {"loras": loras, "embeddings": embeddings}


@collector_paused()
def load_pipeline(
    model: str | Path,
    device: Device,
    precision: Precision,
    scheduler: str | None,
    kind: str = "TextToImagePipeline",
    place: str | None = None,
    variant: str | None = None,
    runtime: str | None = None,
) -> "TextPipeline":
    """The pipeline to draw with, on its device.

    Args:
        model: a name, a folder, or a single file.
        kind: name of a class in `registry.KINDS`.
        place: device with its number, if `device` is not enough.
        variant: such as "fp16", of a folder's weight files.
        runtime: "openvino" or "onnx" instead of torch.
    """
    from latentdiff.pipelines.core.scheduler_names import change_scheduler, find_scheduler

    local_place(str(model))  # errors that need no torch come before it is loaded
    if scheduler is not None:
        find_scheduler(scheduler)
    check_runtime(runtime, model, device, precision)
    if runtime is not None:
        device, place = Device.cpu, None
    elif precision is Precision.int8:
        raise ValueError("--precision int8: torch does not draw in int8; say --runtime openvino or onnx too")

    import torch

    place = place or pick_device(device)
    be_quiet()
    pipeline_class, dtype = find_kind(kind).load(), getattr(torch, precision.value)
    pipeline = open_place(pipeline_class, model, dtype=dtype, variant=variant, runtime=runtime)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    if scheduler is not None:
        pipeline.scheduler = change_scheduler(pipeline.scheduler, scheduler)
    return pipeline.to(place)


def check_runtime(runtime: str | None, model: str | Path, device: Device, precision: Precision) -> None:
    """See that a runtime, if there is one, can draw, before torch is loaded.

    Raises:
        ValueError: it does not draw from this, or compute there or in this precision.
        ImportError: it is not installed.
    """
    if runtime is None:
        return
    from latentdiff.pipelines.runtime.choice import Runtime

    if Path(model).is_file():
        raise ValueError(
            f"--runtime {runtime}: {model} is a single file; make a folder of it: latentdiff convert {model} FOLDER"
        )
    if device not in (Device.auto, Device.cpu):
        raise ValueError(f"--runtime {runtime} computes on the processor; leave --device {device.value} out")
    Runtime(runtime, precision.value)


def be_quiet() -> None:
    """No progress bars of diffusers and transformers; drawing has its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def devices_here() -> list[str]:
    """Where this machine can compute, the fastest first."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name in there if there[name]]


def pick_device(device: Device) -> str:
    """Raises ValueError if there is no such device here."""
    here = devices_here()
    if device is Device.auto:
        return here[0]
    if device.value not in here:
        raise ValueError(f"this machine has no {device.value} device; leave --device out, or say --device cpu")
    return device.value


def split_last(argument: str) -> tuple[str, str | None]:
    """``FILE:WORD`` in two, unless there is a file whose name has the colon in it."""
    before, colon, after = argument.rpartition(":")
    if not colon or not before or os.path.exists(argument) or after.startswith(("/", "\\")):
        return argument, None
    return before, after


def grouped(command: Callable[..., None], argument: str | None = None) -> Callable[..., None]:
    """A command for typer, with the fields of its parameters that are models as options of their own.

    A field is shown as the ``typer.Option`` or our `Option` in its annotation says, or with its description; its
    default and limits are the option's. Fields of several models must have different names.

    Args:
        argument: a field that is the command's argument, and no option.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            groups[parameter.name] = kind
            parameters += [option_of(name, field, name == argument) for name, field in kind.model_fields.items()]
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            values = {field: given.pop(field) for field in kind.model_fields}
            try:  # settings of training have a way of their own to read what is typed
                given[name] = kind.load(None, values) if hasattr(kind, "load") else kind.model_validate(values)
            except ValidationError as error:
                raise ValueError(f"option {first_problem(error)}") from None
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def option_of(name: str, field: FieldInfo, is_argument: bool) -> inspect.Parameter:
    """A field as a parameter that typer shows."""
    shown: Any = next((note for note in field.metadata if isinstance(note, OptionInfo | Option)), None)
    if is_argument or not isinstance(shown, OptionInfo):
        flags = [] if shown is None or is_argument else [shown.flag or f"--{name.replace('_', '-')}"]
        more: dict[str, Any] = {"help": field.description if shown is None else shown.help}
        more["min"] = next((note.ge for note in field.metadata if isinstance(note, Ge)), None)
        more["max"] = next((note.le for note in field.metadata if isinstance(note, Le)), None)
        if is_argument:
            shown = typer.Argument(metavar=name.upper(), **more)
        else:
            shown = typer.Option(*flags, metavar=shown and shown.metavar, **more)
    default = inspect.Parameter.empty if field.is_required() else field.default
    hint: Any = Annotated[field.annotation, shown]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
