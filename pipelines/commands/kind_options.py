"""Which options a kind of pipeline takes; what is given for others is refused before anything is loaded."""

from collections.abc import Callable, Collection
from typing import Any

import typer

from latentdiff.pipelines.batch.drawing_options import (
    DrawingOptions,
    Option,
    Plain,
    RefinedOptions,
    RowOptions,
    SDXLOptions,
)
from latentdiff.pipelines.commands.model_options import LoadingOptions
from latentdiff.pipelines.registry import Kind, find_kind

TEXTLESS = ("class", "none")
NOT_TAKEN: list[tuple[tuple[str, ...], Callable[[Kind], bool], str]] = [
    (("temperature", "top_k", "top_p"), lambda kind: not kind.draws_codes, "draws by diffusion and not code by code"),
    (
        ("guidance_rescale", "guidance_interval", "strength", "variation_seed"),
        lambda kind: kind.draws_codes,
        "draws code by code and not by diffusion",
    ),
    (
        ("guidance_scale", "guidance_rescale", "guidance_interval"),
        lambda kind: kind.conditioned_by == "none",
        "draws from nothing that could guide it",
    ),
    (("lora",), lambda kind: kind.conditioned_by in TEXTLESS and kind.family != "DiT", "draws without text"),
    (
        ("embedding", "candidates", "negative_prompt", "prompt_weights", "long_prompts"),
        lambda kind: kind.conditioned_by in TEXTLESS,
        "draws without text",
    ),
]
"""Options, the kinds that do nothing with them, and why."""
SDXLS = RefinedOptions.model_fields.keys() - DrawingOptions.model_fields.keys()
SDXLS |= SDXLOptions.model_fields.keys() - RowOptions.model_fields.keys()


def default_in(group: Plain, name: str) -> Any:
    return type(group).model_fields[name].default


def given_in(*groups: Plain) -> dict[str, Any]:
    """The options that are not as by default."""
    return {name: value for group in groups for name, value in group if value != default_in(group, name)}


def flag_of(name: str) -> str:
    """How the command line calls an option."""
    notes = RefinedOptions.model_fields[name].metadata if name in RefinedOptions.model_fields else []
    shown = next((note.flag for note in notes if isinstance(note, Option)), None)
    return shown or f"--{name.replace('_', '-')}"


def check_words(
    kind: str,
    prompts: Collection[str],
    classes: list[str] | None,
    loading: LoadingOptions,
    drawing: DrawingOptions,
    *others: Plain,
) -> None:
    """Raises ValueError or BadParameter unless what is given, prompts, classes or neither, is what this kind takes."""
    wanted, model = find_kind(kind).conditioned_by, loading.model
    check_taken(kind, loading, drawing, *others)
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


def check_taken(kind: str, loading: LoadingOptions, *groups: Plain) -> None:
    """Raises ValueError for an option that does nothing with a model of this kind."""
    given, model, own = given_in(loading, *groups), loading.model, find_kind(kind)
    for names, is_idle, why in NOT_TAKEN:
        for name in names:
            if name in given and is_idle(own):
                raise ValueError(f"{flag_of(name)}: the model {model} {why}; leave it out")
    for name in sorted(SDXLS & given.keys()):
        if own.family != "SDXL":
            raise ValueError(f"{flag_of(name)} is for SDXL, and the model {model} is not; leave it out")
