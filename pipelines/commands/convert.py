"""``latentdiff convert``."""

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from latentdiff.extras import check_onnx_export
from latentdiff.pipelines.batch.drawing_options import Plain
from latentdiff.pipelines.commands.model_options import Precision, RuntimeName, be_quiet, grouped
from latentdiff.terminal import say

if TYPE_CHECKING:
    from latentdiff.pipelines.runtime.choice import Runtime


class Form(StrEnum):
    """What to write."""

    folder = "folder"
    file = "file"
    onnx = "onnx"
    diffusers = "diffusers"
    peft = "peft"
    kohya = "kohya"
    a1111 = "a1111"


class Component(StrEnum):
    unet = "unet"
    transformer = "transformer"
    vae = "vae"
    text_encoder = "text_encoder"


FORMS = {
    "model": (Form.folder, Form.file, Form.onnx),
    "lora": (Form.diffusers, Form.peft, Form.kohya),
    "embedding": (Form.diffusers, Form.a1111),
}
READING = ("--prediction-type", "--original-config", "--ema", "--tokenizer", "--scaling-factor", "--vae")
"""Options that only single files take."""
USEFUL = {  # of these to read a component alone
    Component.unet: ("--prediction-type", "--original-config", "--ema"),
    Component.vae: ("--original-config", "--scaling-factor", "--ema"),
    Component.transformer: ("--vae",),
    Component.text_encoder: (),
}


class ReadingOptions(Plain):
    """How a single file is read."""

    prediction_type: str | None = Field(None, description="Of a single file: it predicts epsilon or v_prediction.")
    original_config: Path | None = Field(None, description="Of a single file: the YAML file released with its model.")
    tokenizer: str | None = Field(None, description="Of a single file without CLIP's: folder or hub id of a tokenizer.")
    scaling_factor: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Of a single file's autoencoder, which its weights do not show."
    )
    vae: str | None = Field(
        None,
        description="Of a DiT's checkpoint: folder or hub id of its autoencoder; with it a whole pipeline is written.",
    )
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the averaged weights of a single file's UNet, or its only autoencoder.")
    ] = False
    ckpt: Annotated[
        bool, typer.Option("--ckpt", help="Read pickled files too (.ckpt, .pt, .bin); nothing in them is run.")
    ] = False


@grouped
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of a pipeline, denoiser or autoencoder; .safetensors or .ckpt file; LoRA; embedding. Models "
            "also by name or from the hub.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File or folder to write.")],
    reading: ReadingOptions,
    to: Annotated[
        Form | None,
        typer.Option(
            help="Of a model: folder, file or onnx; by default a file if TARGET ends in .safetensors, else a folder. "
            "Of a LoRA: diffusers, peft or kohya. Of an embedding: diffusers or a1111."
        ),
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of the weights; by default as they are.")] = None,
    variant: Annotated[str | None, typer.Option(help="Part of the weight files' names to write, such as fp16.")] = None,
    from_variant: Annotated[str | None, typer.Option(help="The same of those to read.")] = None,
    component: Annotated[Component | None, typer.Option(help="Convert this network alone.")] = None,
    runtime: Annotated[
        RuntimeName | None,
        typer.Option(help="Put this runtime's graphs into the folder, in --dtype; generate --runtime uses them."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")] = False,
) -> None:
    """Convert a model between a folder, a single file and ONNX; a LoRA or an embedding between formats.

    latentdiff convert v1-5-pruned.safetensors sd15

    latentdiff convert sd15 sd15-half.safetensors --dtype float16

    latentdiff convert vq-f4/model.ckpt vq-f4-diffusers --ckpt

    latentdiff convert DiT-XL-2-256x256.pt dit --ckpt --vae stabilityai/sd-vae-ft-ema

    latentdiff convert lora.safetensors kohya-lora.safetensors --to kohya

    latentdiff convert sd15 sd15-openvino --runtime openvino

    What is written is written whole or not at all. Nothing is replaced without --overwrite.
    """
    target, place = target.expanduser(), Path(source).expanduser()
    if place.exists() and target.exists() and target.samefile(place):
        raise ValueError(f"{target} is the source itself; choose another name")
    be_quiet()
    from latentdiff.interchange.single_file import check_target
    from latentdiff.pipelines.storage.converting import is_free, kind_of_source

    kind = kind_of_source(source, reading.ckpt)
    given = {"--" + name.replace("_", "-"): None if value is False else value for name, value in vars(reading).items()}
    given |= {"--dtype": dtype, "--variant": variant, "--from-variant": from_variant, "--component": component}
    given |= {"--runtime": runtime, "--overwrite": overwrite or None}
    check_form(to, kind, place)
    if dtype is Precision.int8 and runtime is None:
        raise ValueError("--dtype int8: weights are not saved in int8; say --runtime openvino or onnx, for its graphs")
    if kind in ("lora", "embedding"):
        refuse(f"a{'n' if kind == 'embedding' else ''} {kind}", given, set(given) - {"--ckpt", "--overwrite"})
        convert_adapter(kind, place, target, to, reading.ckpt, overwrite)
        return
    if to is None and target.suffix == ".onnx":
        raise ValueError(f"{target}: a model in ONNX is a folder of several files; name one, and say --to onnx")
    form = to or (Form.file if target.suffix == ".safetensors" else Form.folder)
    component = component_of(source, kind, component, form, reading.ckpt)
    check_options(kind, form, component, given)
    (check_target if form is Form.file else is_free)(target, overwrite)  # what cannot be written is refused first
    engine = installed(to, runtime, dtype)
    import torch

    precision = None if engine or dtype is None else getattr(torch, dtype.value)
    pipeline = read_model(source, kind, component, precision, from_variant, reading)
    component = None if reading.vae is not None else component
    write_model(pipeline, form, target, variant, component, overwrite, engine)
    say(f"{target}: {type(pipeline).__name__ if component is None else component.value}")


def installed(to: Form | None, runtime: RuntimeName | None, dtype: Precision | None) -> "Runtime | None":
    """The runtime that is asked for, if any; before a model is loaded.

    Raises:
        ImportError: what is needed for that, or for ONNX, is not installed.
        ValueError: the runtime does not compute in this precision here.
    """
    if to is Form.onnx:
        check_onnx_export()
    if runtime is None:
        return None
    from latentdiff.pipelines.runtime.choice import Runtime

    return Runtime(runtime.value, (dtype or Precision.float32).value)


def check_form(to: Form | None, kind: str, source: Path) -> None:
    """Raises ValueError if what is to be converted has no such form, or has to have one named."""
    forms = FORMS.get(kind, FORMS["model"])
    if to is None and kind == "lora":
        raise ValueError(f"{source} is a LoRA; say in which format to write it: --to {', '.join(forms)}")
    if to is not None and to not in forms:
        what = {"lora": "a LoRA", "embedding": "an embedding"}.get(kind, "a model")
        raise ValueError(f"--to {to}: {what} can be converted to {', '.join(forms)}")


def component_of(source: str, kind: str, component: Component | None, form: Form, ckpt: bool) -> Component | None:
    """The component to convert: the one asked for, or the only one of a source.

    Raises:
        ValueError: a source holds but one, and another is asked for, or a form that takes a whole model.
    """
    from latentdiff.pipelines.storage.converting import network_class, only_part

    held: str | None = None
    if kind == "network":
        held = network_class(Path(source).expanduser())
    elif kind == "checkpoint" and component is None:
        held = only_part(source, ckpt)
    if held is None:
        return component
    if component not in (None, held):
        raise ValueError(f"{source} holds a {held} alone, no {component}")
    if form is Form.onnx:
        raise ValueError(f"{source} holds a {held} alone, and only whole models are converted to ONNX")
    return Component(held)


def check_options(kind: str, form: Form, component: Component | None, given: dict[str, Any]) -> None:
    """Raises ValueError for options that have nothing to act on."""
    if form is Form.file:
        refuse("a single file", given, ("--variant", "--runtime"))
    if form is Form.onnx:
        refuse("ONNX", given, ("--variant", "--component", "--dtype", "--overwrite"))
        refuse("--to onnx, which is for diffusers' own pipelines", given, ("--runtime",))
    if component is not None:
        refuse(f"the {component} alone", given, {*READING, "--runtime"} - set(USEFUL[component]))
    if kind in ("checkpoint", "packed"):
        refuse("a single file", given, ("--from-variant",))
    if component is not Component.transformer:
        refuse("what is no checkpoint of DiT", given, ("--vae",))
    elif form is Form.file and given["--vae"] is None:
        raise ValueError("a transformer alone is written as a folder; give the name of one, without .safetensors")
    if kind != "checkpoint":
        refuse("a file that holds a whole folder" if kind == "packed" else "a folder", given, READING)


def refuse(what: str, given: dict[str, Any], options: Collection[str]) -> None:
    """Raises ValueError if one of the `options`, which have no meaning for `what`, is given."""
    for name, value in given.items():
        if name in options and value is not None:
            raise ValueError(f"{name} does nothing for {what}; leave it out")


def one_part(**part: Any) -> Any:
    """Stands for a pipeline of which there is only one component."""
    return SimpleNamespace(config={}, **part)


def read_model(
    source: str, kind: str, component: Component | None, dtype: Any, variant: str | None, reading: ReadingOptions
) -> Any:
    """The pipeline of a folder or a single file, or something with only the component that is wanted."""
    from latentdiff.interchange.single_file import Checkpoint, OriginalSettings, find_file, read_autoencoder
    from latentdiff.models import DiTTransformer2DModel
    from latentdiff.pipelines.storage.converting import (
        checkpoint_pipeline,
        dit_pipeline,
        folder_pipeline,
        network_alone,
        packed_pipeline,
    )
    from latentdiff.pipelines.storage.single_file_pipelines import AUTOENCODERS, CheckpointParts, check_prediction

    if kind == "network":
        return one_part(**{str(component): network_alone(source, dtype, variant)})
    if kind in ("folder", "packed"):
        place = Path(source).expanduser()
        found = folder_pipeline(source, dtype, variant) if kind == "folder" else packed_pipeline(place, dtype)
        denoiser = component in (Component.unet, Component.transformer)  # a pipeline has its own by both names
        if component and (found.components.get(component) if denoiser else getattr(found, component, None)) is None:
            held = [name for name, part in found.components.items() if part is not None]
            raise ValueError(f"{source} has no {component.value}; it has {', '.join(held)}")
        return found
    if component is Component.transformer:
        if reading.vae is not None:
            return dit_pipeline(source, reading.vae, dtype, reading.ckpt)
        return one_part(
            transformer=DiTTransformer2DModel.from_single_file(source, dtype=dtype, allow_pickle=reading.ckpt)
        )
    check_prediction(reading.prediction_type)
    scale, yaml = reading.scaling_factor, reading.original_config
    stated: dict[str, Any] = {"prediction_type": reading.prediction_type, "scaling_factor": scale}
    if component is None:
        more = {"dtype": dtype, "original_config": yaml, "tokenizer": reading.tokenizer, **stated}
        return checkpoint_pipeline(source, reading.ckpt, reading.ema, **more)
    weights = Checkpoint(find_file(source, reading.ckpt), reading.ckpt)
    if reading.ema:
        weights.use_averages("autoencoder" if component is Component.vae else "UNet")
    if component is Component.vae:
        return one_part(vae=read_autoencoder(weights, AUTOENCODERS, dtype, scale, original_config=yaml))
    parts = CheckpointParts(weights, dtype, OriginalSettings(**stated), yaml)
    part = getattr(parts, component.value)()
    if part is None:
        raise ValueError(f"{source} is SDXL's refiner, which has no first text encoder; the second is in its folder")
    return one_part(**{component.value: part})


def write_model(
    pipeline: Any,
    form: Form,
    target: Path,
    variant: str | None,
    component: Component | None,
    overwrite: bool,
    engine: "Runtime | None" = None,
) -> None:
    from latentdiff.interchange.single_file import write_checkpoint
    from latentdiff.pipelines.storage import converting
    from latentdiff.pipelines.storage.onnx import export_onnx

    if form is Form.onnx:
        export_onnx(pipeline, target)
    elif component is not None and form is Form.file:
        write_checkpoint(*converting.part_weights(pipeline, component.value), target, None, overwrite)
    elif component is not None:
        converting.write_part(pipeline, component.value, target, variant, overwrite)
    elif form is Form.folder:
        converting.write_folder(pipeline, target, variant, overwrite, engine)
    else:
        pipeline.save_single_file(target, overwrite=overwrite)


def convert_adapter(kind: str, source: Path, target: Path, to: Form | None, ckpt: bool, overwrite: bool) -> None:
    """A LoRA or an embedding."""
    if kind == "embedding":
        from latentdiff.interchange.embeddings import convert_embedding

        form: Any = to or Form.diffusers
        found = convert_embedding(source, target, ckpt, to=form.value, overwrite=overwrite)
        words = ", ".join(f"{word} ({number} vectors of {width})" for word, (number, width) in found.words.items())
        say(f"{found.file}: {words}")
        return
    from latentdiff.interchange.lora.formats import convert_lora

    report = convert_lora(source, target, to.value, overwrite=overwrite)  # type: ignore[arg-type, union-attr]
    layers = ", ".join(f"{count} layers of the {network}" for network, count in report.layers.items())
    say(f"{', '.join(map(str, report.files))}: from {report.source_format}, {layers}")
