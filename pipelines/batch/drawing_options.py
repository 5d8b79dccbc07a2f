"""Options of a drawing, each declared once.

The command line, a row of a table of prompts, ``draw_many`` and the record in a picture's file take their options from
these classes; `draw.call_arguments` gives them to a pipeline by the same names. A new option is a line here, and an
argument of the pipeline's call.
"""

import reprlib
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from latentdiff.pipelines.registry import LONGEST_SIDE

BATCH = 8  # images drawn at once; each has its own seed, so this changes memory, speed and last bits only
MOST = 4096  # pictures in one file; more are a fault, or meant to do harm
NOT_FINITE = "for a network gave values that are not finite; the warning says which, and what helps"


def check_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Raises ValueError for what is no interval of noise levels; the upper one may be infinite."""
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError("two noise levels are expected, the lower one from 0 and first")
    return interval


def check_sides(sides: tuple[int, int] | None, least: int = 1) -> tuple[int, int] | None:
    """Raises ValueError for what are no two sides that a UNet may be told."""
    if sides is not None and not all(least <= side <= LONGEST_SIDE for side in sides):
        raise ValueError(f"two numbers of pixels from {least} to {LONGEST_SIDE} are expected, the vertical one first")
    return sides


class Plain(BaseModel):
    """Values of known names and types; anything else is an error."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True)


@dataclass(frozen=True)
class Option:
    """How the command line shows an option.

    flag: by default ``--`` and the name with hyphens.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None


class RowOptions(Plain):
    """What a row of a table of prompts can set for its picture. None: as for all, or as the model has it."""

    negative_prompt: str | None = Field(None, description="What to keep away from.")
    guidance_scale: Annotated[
        float | None,
        Option("How strongly to follow the prompt, 1 and up; by default the model's.", "--guidance"),
        Field(allow_inf_nan=False),
    ] = None
    num_inference_steps: Annotated[
        int | None, Option("Denoising steps; by default the model's.", "--steps"), Field(ge=1)
    ] = None
    height: int | None = Field(None, gt=0, description="In pixels; by default as the model was trained.")
    width: int | None = Field(None, gt=0, description="In pixels; by default as the model was trained.")


class SDXLOptions(RowOptions):
    """What SDXL takes besides: of the pictures drawn together, as its model was told of those it learnt from."""

    prompt_2: str | None = Field(None, description="SDXL: what its second text encoder reads instead of the prompt.")
    negative_prompt_2: str | None = Field(
        None, description="SDXL: what its second text encoder reads instead of the negative prompt."
    )
    original_size: Annotated[
        tuple[int, int] | None,
        Option("SDXL: size of the picture before it was scaled and cut; by default what is drawn.", metavar="H W"),
        AfterValidator(check_sides),
    ] = None
    crops_coords_top_left: Annotated[
        tuple[int, int] | None,
        Option("SDXL: pixels that were cut off at the top and the left; by default none.", "--crop", "TOP LEFT"),
        AfterValidator(partial(check_sides, least=0)),
    ] = None
    target_size: Annotated[
        tuple[int, int] | None,
        Option("SDXL: size that it was cut to; by default what is drawn.", metavar="H W"),
        AfterValidator(check_sides),
    ] = None
    negative_original_size: Annotated[
        tuple[int, int] | None,
        Option("SDXL: the same of what to keep away from; by default as --original-size.", metavar="H W"),
        AfterValidator(check_sides),
    ] = None
    negative_crops_coords_top_left: Annotated[
        tuple[int, int] | None,
        Option("SDXL: the same of what to keep away from.", "--negative-crop", "TOP LEFT"),
        AfterValidator(partial(check_sides, least=0)),
    ] = None
    negative_target_size: Annotated[
        tuple[int, int] | None,
        Option("SDXL: the same of what to keep away from; by default as --target-size.", metavar="H W"),
        AfterValidator(check_sides),
    ] = None


class DrawingOptions(SDXLOptions):
    """What is the same for all pictures that are drawn together."""

    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="Bring guided predictions back to the contrast of unguided ones."
    )
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Option("Noise levels between which guidance acts.", metavar="LOW HIGH"),
        AfterValidator(check_interval),
    ] = None
    prompt_weights: Annotated[
        bool,
        Option("Read weights of words: (red:1.3), (red) for more, square brackets for less.", "--prompt-weights"),
    ] = False
    long_prompts: Literal["cut", "chunk"] = Field(
        "cut", description="A prompt longer than the text encoder takes: cut it, or read it in chunks."
    )

    temperature: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Of a model of codes: lower is safer, 0 the likeliest code alone."
    )
    top_k: int | None = Field(None, ge=1, description="Of a model of codes: draw from this many of the likeliest.")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Of a model of codes: draw from the likeliest that reach this probability."
    )


class RefinerOptions(Plain):
    """Which model goes on with the latents of SDXL's, and where."""

    refiner: str | None = Field(
        None,
        description="SDXL: a second model, which draws the last steps: a folder, a file, or owner/name on the hub.",
    )
    denoising_end: float | None = Field(
        None, gt=0, lt=1, description="SDXL: where on the way from noise the refiner goes on; by default at 0.8."
    )


class RefinedOptions(RefinerOptions, DrawingOptions):
    """What SDXL takes besides where a second model goes on with the first one's latents."""

    aesthetic_score: float | None = Field(
        None, allow_inf_nan=False, description="SDXL's refiner: how good a picture to draw, 1 to 10; by default 6."
    )
    negative_aesthetic_score: float | None = Field(
        None, allow_inf_nan=False, description="SDXL's refiner: how good a picture to keep away from; by default 2.5."
    )


class GenerateOptions(RefinedOptions):
    """What drawing a few pictures from one command can ask for besides."""

    variation_strength: float = Field(
        0.1, ge=0, le=1, description="How much of the noise of VARIATION_SEED is mixed in."
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How much of the picture is drawn anew: 0.8 by default, and all (1) of what a mask covers.",
    )
    candidates: int | None = Field(
        None, ge=1, description="Draw this many of each prompt and keep those that fit it best; see --clip."
    )
    reranker: Annotated[
        str | None,
        Option("What compares candidates: folder of a CLIP, owner/name, or open_clip:MODEL/WEIGHTS.", "--clip"),
    ] = None


def defaults_of(options: type[BaseModel]) -> dict[str, Any]:
    """The names of a class's options, with their defaults."""
    return {name: field.default for name, field in options.model_fields.items()}


IN_WORDS = {
    "missing": "it is missing",
    "string_type": "text is expected",
    "string_too_long": "it must have at most {max_length} characters",
    "string_unicode": "it has characters that are no text",
    "int_type": "a whole number is expected",
    "int_parsing": "a whole number is expected",
    "int_from_float": "a whole number is expected",
    "int_parsing_size": "a smaller number is expected",
    "float_type": "a number is expected",
    "float_parsing": "a number is expected",
    "finite_number": "a finite number is expected",
    "bool_type": "true or false is expected",
    "bool_parsing": "true or false is expected",
    "list_type": "a list is expected",
    "tuple_type": "a list is expected",
    "dict_type": "names with values are expected",
    "literal_error": "{expected} is expected",
    "greater_than": "it must be greater than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
}
"""What pydantic's kinds of error say, for people."""


def wrong_in(details: Any) -> str:
    """One of a `ValidationError`'s errors in words: what is wrong with a value."""
    if details["type"] in IN_WORDS:
        return IN_WORDS[details["type"]].format(**details.get("ctx", {}))
    return str(details["msg"].removeprefix("Value error, "))  # pydantic's, before what our own checks say


def first_problem(error: ValidationError) -> str:
    """What pydantic objects to first: the option's name, what is wrong and what was given."""
    first = error.errors()[0]
    wrong = wrong_in(first)
    if first["type"] == "missing":
        return f"{'.'.join(map(str, first['loc']))}: {wrong}"
    if not first["loc"]:
        return f"settings: {wrong}"
    return f"{'.'.join(map(str, first['loc']))}: {wrong} (got {reprlib.repr(first['input'])})"
