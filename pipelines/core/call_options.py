"""What a call is asked for, as one object, read and checked once."""

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypedDict, get_args, get_origin

from torch import Generator, Tensor

from latentdiff.codec import Generators
from latentdiff.pipelines.core.input_pictures import Pictures, ResizeMode
from latentdiff.pipelines.registry import LONGEST_SIDE

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""(pipeline, step, timestep, tensors) -> the tensors, changed or not."""
Seeds = int | Sequence[int] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
UNSUPPORTED = ("ip_adapter_image", "ip_adapter_image_embeds")
"""Arguments of diffusers' calls that must be None."""


# Numbers of any library, NumPy's and torch's scalars among them


def is_truth(value: Any) -> bool:
    """Whether this is True or False, which Python and torch take for numbers."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def whole_number(value: Any, name: str) -> int:
    """What counts, as Python's int. Raises TypeError for everything that is not exactly a whole number."""
    try:
        return operator.index("" if is_truth(value) else value)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        number = math.nan if are_several(value) else real_number(value, name)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    return int(number)


def real_number(value: Any, name: str, infinite: bool = False) -> float:
    """What measures, as Python's float. Raises TypeError for no number, ValueError for NaN, and mostly for infinity."""
    try:
        number = float(() if is_truth(value) or isinstance(value, str | bytes) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # torch raises the last for several numbers
        raise TypeError(f"{name} must be a number, not {value!r}") from None
    if math.isnan(number) or (math.isinf(number) and not infinite):
        raise ValueError(f"{name} must be a {'number' if infinite else 'finite number'}, not {value!r}")
    return number


def whole_from_zero(value: Any, name: str) -> int:
    """Raises TypeError for what is not a whole number, ValueError for one below 0."""
    number = whole_number(value, name)
    if number < 0:
        raise ValueError(f"{name} must be a whole number from 0, not {value!r}")
    return number


def positive_whole(value: Any, name: str) -> int:
    """Raises ValueError for what is not a whole number from 1."""
    try:
        count = whole_number(value, name)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
    return count


def one_of(*choices: str) -> Callable[[Any, str], str]:
    """A name out of these."""

    def read(value: Any, name: str) -> str:
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        return str(value)

    return read


def one_or_more(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """A number, or a tuple of them of a list, an array and so on."""

    def read_them(value: Any, name: str) -> Any:
        return tuple(read(one, name) for one in value) if are_several(value) else read(value, name)

    return read_them


def are_several(value: Any) -> bool:
    """Whether this is a sequence, an array or a tensor with a dimension, and not a single value or a string."""
    return bool(getattr(value, "ndim", 0)) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def side_lengths(value: Any, name: str, least: int = 1) -> tuple[int, int]:
    """Raises ValueError for what is not (height, width) in pixels."""
    sides = tuple(whole_number(one, name) for one in value) if are_several(value) else ()
    if len(sides) != 2 or not all(least <= side <= LONGEST_SIDE for side in sides):
        raise ValueError(f"{name} must be two whole numbers from {least} to {LONGEST_SIDE}, not {value!r}")
    return sides[0], sides[1]


def part_of_all(value: Any, name: str) -> float:
    """Raises ValueError for what is no share above 0."""
    share = real_number(value, name)
    if not 0 < share <= 1:
        raise ValueError(f"{name} must lie above 0 and up to 1, not {value!r}")
    return share


def noise_levels(value: Any, name: str) -> tuple[float, float]:
    """Raises ValueError for what is not two numbers."""
    levels = one_or_more(partial(real_number, infinite=True))(value, name)
    if not isinstance(levels, tuple) or len(levels) != 2:
        raise ValueError(f"{name} must be two noise levels, not {value!r}")
    return levels


# Tensors and generators


def finite_tensor(value: Any, name: str) -> Tensor:
    """Raises TypeError for what is no tensor, ValueError for values that are not finite."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if not value.isfinite().all():
        raise ValueError(f"{name} has values that are not finite (NaN or infinite)")
    return value


def generators(value: Any, name: str) -> Generators:
    """One, or a list of them. Raises TypeError for anything else."""
    several = isinstance(value, (list, tuple))
    if not all(isinstance(one, Generator) for one in (value if several else [value])):
        raise TypeError(f"{name} must be a torch.Generator or a list of them, not {value!r}; a number is a seed=")
    return list(value) if several else value


def never(value: Any, name: str) -> Literal[False]:
    """Raises ValueError for anything but False."""
    if value is not False:
        raise ValueError(f"{name}={value!r} is not supported; leave it out, or give False")
    return False


# Options

OF_PIXART = (
    *("prompt_attention_mask", "negative_prompt_attention_mask", "max_sequence_length", "use_resolution_binning"),
    "clean_caption",
)


class VariationExtras(TypedDict, total=False):
    """What every call takes besides diffusers' arguments and ``seed``; by name only."""

    variation_seed: Seeds
    """Of a second noise, mixed into that of ``seed``: image i has ``variation_seed + i``, or the i-th of a list."""
    variation_strength: float
    """How much of it, from 0 to 1."""


class Extras(VariationExtras, total=False):
    """What a call with guidance takes besides."""

    guidance_interval: tuple[float, float] | None
    """Noise levels (low, high) between which guidance acts; see ``ClassifierFreeGuidance``."""


class TextExtras(Extras, total=False):
    """What a call with a prompt takes besides."""

    prompt_weights: bool
    """Read ``(red:1.3)``, ``(red)`` and ``[red]`` as weights."""
    long_prompts: Literal["cut", "chunk"]
    """What becomes of a prompt longer than the text encoder takes: cut, with a warning, or encoded in chunks."""
    candidates: int | None
    """Draw this many pictures of each prompt, and keep the ``num_images_per_prompt`` with the best CLIP score."""
    reranker: Any
    """A ``ClipScore``, or where to load one from; by default the pipeline's ``reranker``."""

    prompt_2: str | list[str] | None
    """SDXL: what the second text encoder reads instead of the prompt: one for all, or one for each."""
    negative_prompt_2: str | list[str] | None
    """SDXL: the same of the negative prompt."""
    pooled_prompt_embeds: Tensor | None
    """SDXL: (prompts, D'), with ``prompt_embeds``."""
    negative_pooled_prompt_embeds: Tensor | None
    """SDXL: (prompts, D'), with ``negative_prompt_embeds``."""
    original_size: Sequence[int] | None
    """SDXL: (height, width) of the picture to draw before it was scaled and cut; by default what is drawn."""
    crops_coords_top_left: Sequence[int] | None
    """SDXL: (top, left), how much was cut there; by default (0, 0), nothing."""
    target_size: Sequence[int] | None
    """SDXL: (height, width) of the picture; by default what is drawn."""
    negative_original_size: Sequence[int] | None
    """SDXL: the same of what to keep away from; by default as above."""
    negative_crops_coords_top_left: Sequence[int] | None
    """By default as above; (0, 0) if both other negative ones are given."""
    negative_target_size: Sequence[int] | None
    """By default as above."""
    denoising_start: float | None
    """SDXL: the share of the way from noise that ``image``, latents, has behind it; the rest is drawn."""
    denoising_end: float | None
    """SDXL: stop after this share of the way, for a refiner to go on with the latents."""
    aesthetic_score: float | None
    """SDXL's refiner: how good a picture to draw is, from 1 to 10; by default 6."""
    negative_aesthetic_score: float | None
    """The same of what to keep away from; by default 2.5."""

    prompt_attention_mask: Tensor | None
    """PixArt: (prompts, L), 1 where ``prompt_embeds`` count; by default where they are not zero all through."""
    negative_prompt_attention_mask: Tensor | None
    """PixArt: the same of ``negative_prompt_embeds``."""
    max_sequence_length: int | None
    """PixArt: tokens of a prompt; by default 120, or as many as the text encoder takes."""
    use_resolution_binning: bool | None
    """PixArt: False; any size is drawn as it is given."""
    clean_caption: bool | None
    """PixArt: False; prompts are stripped and their letters made small, and not rewritten."""


class PictureExtras(TextExtras, total=False):
    """What a call with a prompt and a picture takes besides."""

    resize_mode: ResizeMode
    """How a picture of another shape gets to the size to draw at; see `input_pictures.ResizeMode`."""


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What every call can be asked for, documented at ``TextToImagePipeline``; each kind of pipeline adds its own.

    Numbers may be of any library; here they are Python's. A field is read by the function in its annotation.
    """

    num_inference_steps: Annotated[int | None, whole_number] = None
    timesteps: Annotated[Sequence[float] | None, one_or_more(real_number)] = None
    sigmas: Annotated[Sequence[float] | None, one_or_more(real_number)] = None
    eta: Annotated[float, real_number] = 0.0
    height: int | None = None  # these two are read by `LatentPipeline.picture_size`, which knows what fits
    width: int | None = None
    latents: Annotated[Tensor | None, finite_tensor] = None
    generator: Annotated[Generators, generators] = None
    seed: Annotated[Seeds, one_or_more(whole_number)] = None
    variation_seed: Annotated[Seeds, one_or_more(whole_number)] = None
    variation_strength: Annotated[float, real_number] = 0.0
    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From ``locals()`` at the beginning of a call: its arguments, and those in ``extras``.

        Raises:
            TypeError: an unknown argument, or one that should be a number and is none.
            ValueError: an argument that is not supported, a number that cannot be, or an unknown output type.
        """
        given = {name: value for name, value in arguments.items() if name not in ("self", "extras")}
        known = [one.name for one in fields(cls)]
        refuse_unknown("unexpected argument", arguments.get("extras", {}), known, ["prompt"])
        refuse(**{name: given.pop(name, None) for name in UNSUPPORTED})
        return cls(**given, **arguments.get("extras", {}))

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), one.type
            if get_origin(kind) is Annotated and not (value is None and NoneType in get_args(get_args(kind)[0])):
                object.__setattr__(self, one.name, get_args(kind)[1](value, one.name))
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {self.output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")


@dataclass(frozen=True, kw_only=True)
class GuidedOptions(CallOptions):
    """Of a call under classifier-free guidance."""

    guidance_scale: Annotated[float | tuple[float, ...] | None, one_or_more(real_number)] = None
    guidance_rescale: Annotated[float, real_number] = 0.0
    guidance_interval: Annotated[tuple[float, float] | None, noise_levels] = None


@dataclass(frozen=True, kw_only=True)
class TextOptions(GuidedOptions):
    """Of a call with a prompt."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Annotated[Tensor | None, finite_tensor] = None
    negative_prompt_embeds: Annotated[Tensor | None, finite_tensor] = None
    num_images_per_prompt: Annotated[int | None, positive_whole] = 1
    clip_skip: Annotated[int | None, whole_number] = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    prompt_weights: bool = False
    long_prompts: Literal["cut", "chunk"] = "cut"
    candidates: Annotated[int | None, positive_whole] = None
    reranker: Any = None
    prompt_2: str | list[str] | None = None
    negative_prompt_2: str | list[str] | None = None
    pooled_prompt_embeds: Annotated[Tensor | None, finite_tensor] = None
    negative_pooled_prompt_embeds: Annotated[Tensor | None, finite_tensor] = None
    original_size: Annotated[tuple[int, int] | None, side_lengths] = None
    crops_coords_top_left: Annotated[tuple[int, int] | None, partial(side_lengths, least=0)] = None
    target_size: Annotated[tuple[int, int] | None, side_lengths] = None
    negative_original_size: Annotated[tuple[int, int] | None, side_lengths] = None
    negative_crops_coords_top_left: Annotated[tuple[int, int] | None, partial(side_lengths, least=0)] = None
    negative_target_size: Annotated[tuple[int, int] | None, side_lengths] = None
    denoising_start: Annotated[float | None, part_of_all] = None
    denoising_end: Annotated[float | None, part_of_all] = None
    aesthetic_score: Annotated[float | None, real_number] = None
    negative_aesthetic_score: Annotated[float | None, real_number] = None
    prompt_attention_mask: Annotated[Tensor | None, finite_tensor] = None
    negative_prompt_attention_mask: Annotated[Tensor | None, finite_tensor] = None
    max_sequence_length: Annotated[int | None, positive_whole] = None
    use_resolution_binning: Annotated[bool | None, never] = None
    clean_caption: Annotated[bool | None, never] = None

    @property
    def pixart(self) -> dict[str, Any]:
        """What only PixArt takes and was given."""
        return {name: getattr(self, name) for name in OF_PIXART if getattr(self, name) is not None}

    @property
    def sdxl(self) -> dict[str, Any]:
        """What only SDXL takes and was given."""
        ends = ("_size", "_left", "_2", "_start", "_end", "_score")
        names = [name for name in TextExtras.__annotations__ if name.endswith(ends) or "pooled" in name]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def lora_scale(self) -> float | None:
        """How strongly loaded LoRAs act in this call; None: as they are set.

        Raises:
            TypeError, ValueError: ``cross_attention_kwargs`` asks for something else, or the scale is no number.
        """
        given = self.cross_attention_kwargs or {}
        others = [name for name in given if name != "scale"]
        if others:
            raise ValueError(f"cross_attention_kwargs: {', '.join(others)} is not supported, only 'scale'")
        scale = given.get("scale")
        return None if scale is None else real_number(scale, "cross_attention_kwargs: scale")


@dataclass(frozen=True, kw_only=True)
class PictureOptions(TextOptions):
    """Of a call with a prompt and a picture."""

    image: Pictures = None
    resize_mode: Annotated[ResizeMode, one_of(*get_args(ResizeMode))] = "crop"


@dataclass(frozen=True, kw_only=True)
class StartOptions(PictureOptions):
    """Of a call with a prompt and a picture to start from."""

    strength: Annotated[float, real_number] = 0.8


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raises TypeError, which begins with `what`, for a name that is not known, with the nearest that is.

    Args:
        others: names that may be meant, too.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *others], n=1)
            raise TypeError(f"{what} {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def refuse(**arguments: Any) -> None:
    """Raises ValueError for arguments of diffusers that are given and not supported."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported")
