"""What clients send, in OpenAI's names and ours, read and checked; nothing in it reaches a pipeline unread."""

import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from latentdiff.interchange.picture_files import picture_of
from latentdiff.pipelines.batch.draw import SourcePictures, check_seeds, paired
from latentdiff.pipelines.batch.drawing_options import GenerateOptions, first_problem
from latentdiff.pipelines.batch.record import UsedFile
from latentdiff.pipelines.core.call_options import refuse_unknown

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    pixels: int | None = None
    """Of one picture; None: by its model, see `ServedModel.pixels`."""
    steps: int = 100
    count: int = 10
    """Pictures."""
    prompt: int = 4000
    """Characters, of a negative prompt too."""
    upload: int = 32 * 2**20
    """Bytes of a request's body."""


class RequestError(ValueError):
    """What was sent cannot be drawn.

    Args:
        param: which field is to blame.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class DrawRequest(BaseModel):
    """The body of a request for pictures: OpenAI's fields first, then ours."""

    model_config = ConfigDict(extra="allow")  # to say what was meant; see `read_request`

    prompt: str
    model: str | None = None
    n: int | None = Field(None, ge=1)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0)
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = None
    style: str | None = None
    user: str | None = None
    moderation: str | None = None
    input_fidelity: str | None = None

    seed: int | None = Field(None, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    negative_prompt: str | None = None
    strength: float | None = Field(None, ge=0, le=1)
    guidance_rescale: float | None = Field(None, ge=0, le=1)
    prompt_weights: bool | None = None
    denoising_end: float | None = Field(None, gt=0, lt=1)
    aesthetic_score: float | None = Field(None, allow_inf_nan=False)
    negative_aesthetic_score: float | None = Field(None, allow_inf_nan=False)
    lora: Annotated[list[str] | None, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = (
        None
    )
    scores: bool | None = None

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Names and strengths of ``lora``, NAME or NAME:STRENGTH."""
        return [name_and_scale(one) for one in self.lora or []]

    @property
    def options(self) -> dict[str, Any]:
        """As fields of `Settings`."""
        named = {name: getattr(self, name) for name in OURS if name in GenerateOptions.model_fields}
        width, height = self.sides
        return {**named, "num_inference_steps": self.steps, "width": width, "height": height}

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Width and height; None: as the model was trained, or as the picture has them."""
        found = SIZE.fullmatch(self.size or "")
        return (int(found[1]), int(found[2])) if found else (None, None)

    def seeds(self) -> list[int]:
        """Of its pictures; without a seed, from a random one."""
        first = int.from_bytes(os.urandom(4)) if self.seed is None else self.seed
        count = self.n or 1
        check_seeds(first, count)
        return [first + i for i in range(count)]


def name_and_scale(text: str) -> tuple[str, float]:
    """Raises RequestError for a strength that is not finite."""
    name, _, scale = text.rpartition(":")
    try:
        strength = float(scale)
    except ValueError:
        return text, 1.0
    if not name:
        return text, 1.0
    if not math.isfinite(strength):
        raise RequestError(f"lora: the strength must be a finite number, not {scale}", "lora")
    return name, strength


OURS = (
    *("guidance_scale", "negative_prompt", "strength", "guidance_rescale", "prompt_weights"),
    *("denoising_end", "aesthetic_score", "negative_aesthetic_score"),
)


R = TypeVar("R", bound=BaseModel)


def read_fields(kind: type[R], values: Mapping[str, Any]) -> R:
    """Raises RequestError for unknown fields and values that cannot be meant."""
    try:
        refuse_unknown("unknown field", values, kind.model_fields)
        return kind.model_validate(values)
    except ValidationError as error:
        raise RequestError(first_problem(error), str(error.errors()[0]["loc"][0])) from None
    except TypeError as error:
        raise RequestError(str(error)) from None


def read_request(values: Mapping[str, Any], limits: Limits) -> DrawRequest:
    """Raises RequestError for unknown fields, values of other types, and what is beyond the limits."""
    request = read_fields(DrawRequest, values)
    if not request.prompt.strip():
        raise RequestError('the prompt is empty; say what to draw, for instance "a red car"', "prompt")
    if request.size not in (None, "auto") and request.sides == (None, None):
        raise RequestError(f"size: {request.size!r} is neither auto nor such as 128x128", "size")
    check_text(request)
    check_limits(request, limits)
    if request.partial_images and not request.stream:
        raise RequestError("partial_images come in a stream; send stream=true too, or leave them out", "partial_images")
    if request.output_compression not in (None, 100) and request.output_format in (None, "png"):
        raise RequestError("output_compression is of jpeg and webp; say output_format too", "output_compression")
    return request


def check_text(request: DrawRequest) -> None:
    """Raises RequestError for halves of characters, which JSON can name and no tokenizer reads."""
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise RequestError(f"{name}: it has characters that are no text (halves of UTF-16)", name) from None


def check_limits(request: DrawRequest, limits: Limits) -> None:
    """Raises RequestError."""
    asked = {
        "n": (request.n or 1, limits.count, "pictures"),
        "steps": (request.steps or 1, limits.steps, "steps"),
        "prompt": (len(request.prompt), limits.prompt, "characters"),
        "negative_prompt": (len(request.negative_prompt or ""), limits.prompt, "characters"),
        "partial_images": (request.partial_images or 0, limits.steps, "previews"),
    }
    for name, (value, most, what) in asked.items():
        if value > most:
            raise RequestError(f"{name}: {reprlib.repr(value)} {what} are more than this server gives, {most}", name)


def check_size(width: int, height: int, factor: int, most: int, own: tuple[int, int]) -> None:
    """Raises RequestError for sides that are no multiples of `factor`, and for more than `most` pixels in all.

    own: width and height that the model has by itself.
    """
    if not width or not height or width % factor or height % factor or width * height > most:
        raise RequestError(
            f"size: {width}x{height} cannot be drawn: both sides must be multiples of {factor}, and width times height "
            f"at most {most}, such as {own[0]}x{own[1]}",
            "size",
        )


def read_pictures(
    files: Mapping[str, tuple[str, bytes]],
) -> tuple[SourcePictures, dict[str, UsedFile]]:
    """Pictures that were sent, and what a record says of them.

    Args:
        files: name and content of ``image`` and, perhaps, ``mask``.

    Raises:
        RequestError: they are none, or differ in size.
    """
    found: dict[str, Image.Image] = {}
    used: dict[str, UsedFile] = {}
    for name, (file, content) in files.items():
        try:
            picture, digest = picture_of(content, name)
        except ValueError as error:
            raise RequestError(str(error), name) from None
        found[name] = painted(picture) if name == "mask" else picture
        used[name] = UsedFile(file=PurePath(file).name or f"{name}.png", sha256=digest)
    try:
        return paired(found, {name: name for name in found}), used
    except ValueError as error:
        raise RequestError(str(error), "mask") from None


def painted(mask: Image.Image) -> Image.Image:
    """A mask that is white where to paint: one with transparency is OpenAI's, who paint where it is transparent."""
    alpha = mask.convert("RGBA").getchannel("A") if mask.has_transparency_data else None
    if alpha is None or alpha.getextrema() == (255, 255):  # browsers' pictures have opacity, used or not
        return mask
    return alpha.point([255 - level for level in range(256)])
