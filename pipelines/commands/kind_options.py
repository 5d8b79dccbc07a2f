"""Which options a kind of pipeline takes; what is given for others is refused before anything is loaded."""

from collections.abc import Collection
from typing import Any

import typer

from latentdiff.pipelines.batch.drawing_options import DrawingOptions, Plain, RefinedOptions, RowOptions, SDXLOptions
from latentdiff.pipelines.commands.model_options import LoadingOptions
from latentdiff.pipelines.registry import find_kind


def default_in(group: Plain, name: str) -> Any:
    return type(group).model_fields[name].default


def check_words(
    kind: str, prompts: Collection[str], classes: list[str] | None, loading: LoadingOptions, drawing: DrawingOptions
) -> None:
    """Raises ValueError or BadParameter unless what is given, prompts, classes or neither, is what this kind takes."""
    wanted, model = find_kind(kind).conditioned_by, loading.model
    check_family(kind, model, drawing)
    if wanted == "text":
        if classes:
            raise ValueError(f"--class: the model {model} draws from words and has no classes; give a PROMPT instead")
        if not prompts:
            raise typer.BadParameter('say what to draw, for instance "a red car"', param_hint="PROMPT")
        return
    if prompts:
        instead = "say --class NAME" if wanted == "class" else "leave the prompt out, and say with -n how many to draw"
        raise ValueError(f"the model {model} does not draw from words; {instead}")
    if wanted == "class" and not classes:
        raise ValueError(f"the model {model} draws pictures of classes; say of which: --class NAME")
    if wanted == "none" and classes:
        raise ValueError(f"--class: the model {model} was trained without classes; leave it out")
    words: dict[str, Any] = {
        "--lora": None if find_kind(kind).family == "DiT" else loading.lora,
        "--embedding": loading.embedding,
        "--candidates": getattr(drawing, "candidates", None),
    }
    words |= {"--negative-prompt": drawing.negative_prompt, "--prompt-weights": drawing.prompt_weights or None}
    for name in [name for name, value in words.items() if value is not None]:
        raise ValueError(f"{name}: the model {model} draws without text; leave it out")


def check_family(kind: str, model: str, drawing: DrawingOptions) -> None:
    """Raises ValueError for an option that only SDXL takes, or only models of codes, with another model."""
    for name in ("temperature", "top_k", "top_p"):
        if getattr(drawing, name) != default_in(drawing, name) and not find_kind(kind).draws_codes:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: the model {model} draws by diffusion and not code by code; leave it out")
    if find_kind(kind).family == "SDXL":
        return
    fields = RefinedOptions.model_fields
    ours = SDXLOptions.model_fields.keys() - RowOptions.model_fields.keys()
    for name in sorted(ours | (fields.keys() - DrawingOptions.model_fields.keys())):
        if getattr(drawing, name, None) is not None:
            shown = next((note.flag for note in fields[name].metadata if hasattr(note, "flag")), None)
            flag = shown or f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is for SDXL, and the model {model} is not; leave it out")
