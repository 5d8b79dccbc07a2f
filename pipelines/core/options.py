"""What a call is asked for, as one object, read and checked once."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypedDict

from torch import Tensor

from latentdiff.codec import Generators
from latentdiff.pipelines.core.pictures import Pictures

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""(pipeline, step, timestep, tensors) -> the tensors, changed or not."""
Seeds = int | Sequence[int] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
UNSUPPORTED = ("ip_adapter_image", "ip_adapter_image_embeds")
"""Arguments of diffusers' calls that must be None."""


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


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What every call can be asked for, documented at ``TextToImagePipeline``; each kind of pipeline adds its own."""

    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    latents: Tensor | None = None
    generator: Generators = None
    seed: Seeds = None
    variation_seed: Seeds = None
    variation_strength: float = 0.0
    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From ``locals()`` at the beginning of a call: its arguments, and those in ``extras``.

        Raises:
            TypeError: an unknown argument.
            ValueError: an argument that is not supported, or an unknown output type.
        """
        given = {name: value for name, value in arguments.items() if name not in ("self", "extras")}
        known = [one.name for one in fields(cls)]
        for name in arguments.get("extras", {}):
            if name not in known:
                near = difflib.get_close_matches(name, [*known, "prompt"], n=1)
                raise TypeError(f"unexpected argument {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        refuse(**{name: given.pop(name, None) for name in UNSUPPORTED})
        options = cls(**given, **arguments.get("extras", {}))
        if options.output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {options.output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")
        return options


@dataclass(frozen=True, kw_only=True)
class GuidedOptions(CallOptions):
    """Of a call under classifier-free guidance."""

    guidance_scale: float | Sequence[float] | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class TextOptions(GuidedOptions):
    """Of a call with a prompt."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    num_images_per_prompt: int | None = 1
    clip_skip: int | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    prompt_weights: bool = False
    long_prompts: Literal["cut", "chunk"] = "cut"
    candidates: int | None = None
    reranker: Any = None

    @property
    def lora_scale(self) -> float | None:
        """How strongly loaded LoRAs act in this call; None: as they are set.

        Raises:
            ValueError: ``cross_attention_kwargs`` asks for something else.
        """
        others = [name for name in self.cross_attention_kwargs or {} if name != "scale"]
        if others:
            raise ValueError(f"cross_attention_kwargs: {', '.join(others)} is not supported, only 'scale'")
        return (self.cross_attention_kwargs or {}).get("scale")


@dataclass(frozen=True, kw_only=True)
class PictureOptions(TextOptions):
    """Of a call with a prompt and a picture to start from."""

    image: Pictures = None
    strength: float = 0.8


def refuse(**arguments: Any) -> None:
    """Raises ValueError for arguments of diffusers that are given and not supported."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported")


def check_count(given: int | None, name: str = "num_images_per_prompt") -> int:
    """Raises ValueError for a number of pictures that is not a whole number from 1."""
    count = 1 if given is None else given
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a whole number from 1, not {given!r}")
    return count
