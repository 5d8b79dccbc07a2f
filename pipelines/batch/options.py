"""Options of a drawing, each declared once.

The command line, a row of a table of prompts, ``draw_many`` and the record in a picture's file take their options from
these classes; `draw.call_arguments` gives them to a pipeline by the same names. A new option is a line here, and an
argument of the pipeline's call.
"""

import reprlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:
    from pydantic import ValidationError

BATCH = 8  # images drawn at once; each has its own seed, so this changes memory, speed and last bits only
MOST = 4096  # pictures in one file; more are a fault, or meant to do harm


@dataclass(frozen=True)
class Option:
    """How the command line shows an option.

    flag: by default ``--`` and the name with hyphens.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None


@dataclass(kw_only=True)
class RowOptions:
    """What a row of a table of prompts can set for its picture. None: as for all, or as the model has it."""

    negative_prompt: Annotated[str | None, Option("What to keep away from.")] = None
    guidance_scale: Annotated[
        float | None,
        Option("How strongly to follow the prompt, 1 and up; by default the model's.", "--guidance"),
    ] = None
    num_inference_steps: Annotated[int | None, Option("Denoising steps; by default the model's.", "--steps"), Ge(1)] = (
        None
    )
    height: Annotated[int | None, Option("In pixels; by default as the model was trained."), Gt(0)] = None
    width: Annotated[int | None, Option("In pixels; by default as the model was trained."), Gt(0)] = None


@dataclass(kw_only=True)
class DrawingOptions(RowOptions):
    """What is the same for all pictures that are drawn together."""

    guidance_rescale: Annotated[
        float, Option("Bring guided predictions back to the contrast of unguided ones."), Ge(0), Le(1)
    ] = 0.0
    guidance_interval: Annotated[
        tuple[float, float] | None, Option("Noise levels between which guidance acts.", metavar="LOW HIGH")
    ] = None
    prompt_weights: Annotated[
        bool,
        Option("Read weights of words: (red:1.3), (red) for more, square brackets for less.", "--prompt-weights"),
    ] = False
    long_prompts: Annotated[
        Literal["cut", "chunk"],
        Option("A prompt longer than the text encoder takes: cut it, or read it in chunks."),
    ] = "cut"


@dataclass(kw_only=True)
class GenerateOptions(DrawingOptions):
    """What drawing a few pictures from one command can ask for besides."""

    variation_strength: Annotated[
        float, Option("How much of the noise of VARIATION_SEED is mixed in."), Ge(0), Le(1)
    ] = 0.1
    strength: Annotated[
        float | None,
        Option("How much of the picture is drawn anew: 0.8 by default, and all (1) of what a mask covers."),
        Ge(0),
        Le(1),
    ] = None
    candidates: Annotated[
        int | None, Option("Draw this many of each prompt and keep those that fit it best; see --clip."), Ge(1)
    ] = None
    reranker: Annotated[
        str | None,
        Option("What compares candidates: folder of a CLIP, owner/name, or open_clip:MODEL/WEIGHTS.", "--clip"),
    ] = None


def model_of(options: type[RowOptions], base: Any) -> Any:
    """A pydantic model, a subclass of `base`, with the options as its fields."""
    from pydantic import create_model

    hints = get_type_hints(options, include_extras=True)
    definitions: dict[str, Any] = {name: (hints[name], value) for name, value in defaults_of(options).items()}
    return create_model(options.__name__, __base__=base, **definitions)


def defaults_of(options: type[RowOptions]) -> dict[str, Any]:
    """The names of a class's options, with their defaults."""
    return {field.name: field.default for field in fields(options)}


def first_problem(error: "ValidationError") -> str:
    """What pydantic objects to first: the option's name, what is wrong and what was given."""
    first = error.errors()[0]
    if not first["loc"]:
        return f"settings: {first['msg']}"
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {reprlib.repr(first['input'])})"
