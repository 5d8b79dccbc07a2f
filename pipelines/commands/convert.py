"""``latentdiff convert``."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.pipelines.commands.grouped import grouped
from latentdiff.pipelines.commands.options import Precision, be_quiet


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
    vae = "vae"
    text_encoder = "text_encoder"


MODEL_FORMS = (None, Form.folder, Form.file, Form.onnx)
USEFUL = {  # to read a component alone
    Component.unet: ("--prediction-type", "--original-config", "--ema"),
    Component.vae: ("--original-config", "--scaling-factor", "--ema"),
    Component.text_encoder: (),
}
LORA_FORMS = (Form.diffusers, Form.peft, Form.kohya)
EMBEDDING_FORMS = (None, Form.diffusers, Form.a1111)


@dataclass(frozen=True)
class ReadingOptions:
    """How a single file is read."""

    prediction_type: Annotated[
        str | None, typer.Option(help="What a single file's model predicts: epsilon or v_prediction.")
    ] = None
    original_config: Annotated[
        Path | None, typer.Option(help="YAML file that was released with a single file's model.")
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id of a tokenizer, for a single file without CLIP's.")
    ] = None
    scaling_factor: Annotated[
        float | None, typer.Option(help="Of a single file's autoencoder, which its weights do not show.")
    ] = None
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the averaged weights of a single file's UNet, or its only autoencoder.")
    ] = False
    ckpt: Annotated[
        bool, typer.Option("--ckpt", help="Read pickled files too (.ckpt, .pt, .bin); nothing in them is run.")
    ] = False

    @property
    def given(self) -> dict[str, Any]:
        """Those that only single files take, by their flags."""
        return {
            "--prediction-type": self.prediction_type,
            "--original-config": self.original_config,
            "--ema": self.ema or None,
            "--tokenizer": self.tokenizer,
            "--scaling-factor": self.scaling_factor,
        }


@grouped
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of a pipeline, UNet or autoencoder; .safetensors or .ckpt file; LoRA; embedding. Models also "
            "by name or from the hub.",
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")] = False,
) -> None:
    """Convert a model between a folder, a single file and ONNX; a LoRA or an embedding between formats.

    latentdiff convert v1-5-pruned.safetensors sd15

    latentdiff convert sd15 sd15-half.safetensors --dtype float16

    latentdiff convert vq-f4/model.ckpt vq-f4-diffusers --ckpt

    latentdiff convert lora.safetensors kohya-lora.safetensors --to kohya

    What is written is written whole or not at all. Nothing is replaced without --overwrite.
    """
    target = target.expanduser()
    if Path(source).expanduser().exists() and target.exists() and target.samefile(Path(source).expanduser()):
        raise ValueError(f"{target} is the source itself; choose another name")
    be_quiet()
    from latentdiff.pipelines.storage.converting import kind_of_source, network_class, only_part

    kind = kind_of_source(source, reading.ckpt)
    held: str | None = None
    shaping = {"--dtype": dtype, "--variant": variant, "--component": component}
    if kind in ("lora", "embedding"):
        refuse(
            f"a{'n' if kind == 'embedding' else ''} {kind}",
            {**reading.given, **shaping, "--from-variant": from_variant},
        )
        convert_adapter(kind, Path(source).expanduser(), target, to, reading.ckpt, overwrite)
        return
    check_form(to, MODEL_FORMS, "a model")
    form = to or (Form.file if target.suffix == ".safetensors" else Form.folder)
    if kind == "network":
        held = network_class(Path(source).expanduser())
    elif kind == "checkpoint" and component is None:
        held = only_part(source, reading.ckpt)
    if held is not None:
        component = alone(source, held, component, form)
    check_options(form, variant, component, dtype, overwrite)
    if component is not None:
        refuse(
            f"the {component} alone",
            {key: value for key, value in reading.given.items() if key not in USEFUL[component]},
        )
    check_place(form, target, overwrite)
    import torch

    precision = None if dtype is None else getattr(torch, dtype.value)
    pipeline: Any
    if kind == "network":
        refuse("a folder", reading.given)
        from latentdiff.pipelines.storage.converting import network_alone

        pipeline = OnePart(**{str(component): network_alone(source, precision, from_variant)})
    elif kind == "folder":
        refuse("a folder", reading.given)
        from latentdiff.pipelines.storage.converting import folder_pipeline

        pipeline = folder_pipeline(source, precision, from_variant)
    else:
        refuse("a single file", {"--from-variant": from_variant})
        pipeline = read_file(source, precision, component, reading)
    write(pipeline, form, target, variant, component, overwrite)


def read_file(source: str, dtype: Any, component: Component | None, reading: ReadingOptions) -> Any:
    """The pipeline of a single file, or something with only the component that is wanted."""
    from latentdiff.interchange.single_file import Checkpoint, OriginalSettings, find_file, read_autoencoder
    from latentdiff.pipelines.storage.converting import checkpoint_pipeline
    from latentdiff.pipelines.storage.single_file import check_prediction
    from latentdiff.pipelines.storage.single_file_parts import AUTOENCODERS, CheckpointParts

    check_prediction(reading.prediction_type)
    scale, yaml = reading.scaling_factor, reading.original_config
    stated: dict[str, Any] = {"prediction_type": reading.prediction_type, "scaling_factor": scale}
    if component is None:
        return checkpoint_pipeline(
            source,
            reading.ckpt,
            reading.ema,
            dtype=dtype,
            original_config=yaml,
            tokenizer=reading.tokenizer,
            **stated,
        )
    weights = Checkpoint(find_file(source, reading.ckpt), reading.ckpt)
    if reading.ema:
        weights.use_averages("autoencoder" if component is Component.vae else "UNet")
    if component is Component.vae:
        return OnePart(vae=read_autoencoder(weights, AUTOENCODERS, dtype, scale, original_config=yaml))
    parts = CheckpointParts(weights, dtype, OriginalSettings(**stated), yaml)
    return OnePart(**{component.value: getattr(parts, component.value)()})


def alone(source: str, held: str, component: Component | None, form: Form) -> Component:
    """The component to convert where a source holds but one.

    Raises:
        ValueError: another is asked for, or a form that takes a whole model.
    """
    if component not in (None, held):
        raise ValueError(f"{source} holds a {held} alone, no {component}")
    if form is Form.onnx:
        raise ValueError(f"{source} holds a {held} alone, and only whole models are converted to ONNX")
    return Component(held)


class OnePart:
    """Stands for a pipeline of which there is only one component."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)
        self.config: dict[str, Any] = {}


def write(
    pipeline: Any, form: Form, target: Path, variant: str | None, component: Component | None, overwrite: bool
) -> None:
    from latentdiff.pipelines.storage import converting

    if form is Form.onnx:
        from latentdiff.pipelines.storage.onnx import export_onnx

        export_onnx(pipeline, target)
    elif component is not None and form is Form.file:
        from latentdiff.interchange.single_file import write_checkpoint

        write_checkpoint(*converting.part_weights(pipeline, component.value), target, None, overwrite)
    elif component is not None:
        converting.write_part(pipeline, component.value, target, variant, overwrite)
    elif form is Form.folder:
        converting.write_folder(pipeline, target, variant, overwrite)
    else:
        if not hasattr(pipeline, "save_single_file"):
            raise ValueError(f"a {type(pipeline).__name__} has no text encoder and no single file; convert to a folder")
        pipeline.save_single_file(target, overwrite=overwrite)
    what = component.value if component is not None else type(pipeline).__name__
    typer.echo(f"{target}: {what}")


def convert_adapter(kind: str, source: Path, target: Path, to: Form | None, ckpt: bool, overwrite: bool) -> None:
    """A LoRA or an embedding."""
    if kind == "embedding":
        check_form(to, EMBEDDING_FORMS, "an embedding")
        from latentdiff.interchange.embeddings import convert_embedding

        found = convert_embedding(
            source, target, ckpt, to="a1111" if to is Form.a1111 else "diffusers", overwrite=overwrite
        )
        words = ", ".join(f"{word} ({number} vectors of {width})" for word, (number, width) in found.words.items())
        typer.echo(f"{found.file}: {words}")
        return
    if to is None:
        raise ValueError(f"{source} is a LoRA; say in which format to write it: --to {', '.join(LORA_FORMS)}")
    check_form(to, LORA_FORMS, "a LoRA")
    from latentdiff.interchange.lora.formats import convert_lora

    report = convert_lora(source, target, to.value, overwrite=overwrite)  # type: ignore[arg-type]
    layers = ", ".join(f"{count} layers of the {network}" for network, count in report.layers.items())
    typer.echo(f"{', '.join(map(str, report.files))}: from {report.source_format}, {layers}")


def check_form(to: Form | None, forms: tuple[Form | None, ...], what: str) -> None:
    if to not in forms:
        known = ", ".join(form for form in forms if form is not None)
        raise ValueError(f"--to {to}: {what} can be converted to {known}")


def check_options(
    form: Form, variant: str | None, component: Component | None, dtype: Precision | None, overwrite: bool
) -> None:
    """Raises ValueError for options that have nothing to act on."""
    if form is not Form.folder:
        refuse("a single file" if form is Form.file else "ONNX", {"--variant": variant})
    if form is Form.onnx:
        refuse("ONNX", {"--component": component, "--dtype": dtype, "--overwrite": overwrite or None})


def check_place(form: Form, target: Path, overwrite: bool) -> None:
    """Raises ValueError or FileExistsError for what cannot or must not be written, before anything is read."""
    from latentdiff.interchange.single_file import check_target
    from latentdiff.pipelines.storage.converting import is_free

    if form is Form.file:
        check_target(target, overwrite)
    else:
        is_free(target, overwrite)


def refuse(what: str, options: dict[str, Any]) -> None:
    """Raises ValueError for options that are given and have no meaning for `what`."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} does nothing for {what}; leave it out")
