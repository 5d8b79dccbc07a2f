"""One call of a pipeline: what it was asked for beyond diffusers' arguments, how it goes on, what it gives."""

import difflib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypedDict, TypeVar

from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from latentdiff.diffusion import process_of
from latentdiff.pipelines.noise import NoiseSource

P = ParamSpec("P")
Owner = TypeVar("Owner")
Result = TypeVar("Result")


class Extras(TypedDict, total=False):
    """What every call takes besides diffusers' arguments and ``seed``; by name only."""

    guidance_interval: tuple[float, float] | None
    """Noise levels (low, high) between which guidance acts; see ``ClassifierFreeGuidance``."""
    variation_seed: int | Sequence[int] | None
    """Of a second noise, mixed into that of ``seed``: image i has ``variation_seed + i``, or the i-th of a list."""
    variation_strength: float
    """How much of it, from 0 to 1."""


class TextExtras(Extras, total=False):
    """What a call with a prompt takes besides."""

    prompt_weights: bool
    """Read ``(red:1.3)``, ``(red)`` and ``[red]`` as weights."""
    long_prompts: Literal["cut", "chunk"]
    """What becomes of a prompt longer than the text encoder takes: cut, with a warning, or encoded in chunks."""
    candidates: int | None
    """Draw so many pictures of each prompt, and keep the ``num_images_per_prompt`` with the best CLIP score."""
    reranker: Any
    """A ``ClipScore``, or where to load one from; by default the pipeline's ``reranker``."""


@dataclass
class ImagesOutput(BaseOutput):
    """Pictures, as diffusers' ``StableDiffusionPipelineOutput`` has them.

    ``images``: B PIL images, an array (B, H, W, 3) with values in [0, 1], or a tensor (B, 3, H, W) in [0, 1] or of
    latents (B, C, h, w), by ``output_type``. ``nsfw_content_detected``: B truth values if there is a safety checker;
    what it objects to is black. ``seeds``: of each image, if seeds were given; with one of them alone the call draws
    that image again. ``scores``: of each image, with ``candidates``, best first within a prompt.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None
    seeds: list[int] | None = None
    scores: list[float] | None = None


@dataclass
class Progress:
    """Where a drawing stands after a step. When all is done, the last comes once more, with the ``output``."""

    step: int
    """0 for the first."""
    total: int
    timestep: Any
    latents: Tensor
    """(B, C, h, w), noisy still."""
    scheduler: Any = field(repr=False)
    scaled: Tensor = field(repr=False)
    """What the network saw, (B, C, h, w)."""
    prediction: Tensor = field(repr=False)
    """What it said."""
    colours: Callable[[Tensor], list[Image.Image]] = field(repr=False)
    """Clean latents to small pictures."""
    output: ImagesOutput | None = None

    @property
    def clean(self) -> Tensor:
        """(B, C, h, w), the latents that this step takes for the picture, without noise."""
        return process_of(self.scheduler).clean(self.scaled, self.prediction, self.timestep)

    def preview(self) -> list[Image.Image]:
        """B small pictures, (h, w), of what this step takes for the picture; costs next to nothing."""
        return self.colours(self.clean)


@dataclass
class Drawing:
    """What the parts of one call share once its prompts are read: B images of P prompts."""

    embeds: Any
    """(B, L, D), with guidance (2B, L, D), those without the prompt first; None where there is no text."""
    count: int
    """B, candidates among them."""
    noise: NoiseSource
    seeds: list[int] | None
    output_type: str
    return_dict: bool
    prompts: list[str] | None = None
    """P of them, where candidates are compared."""
    drawn: int = 1
    """Images of each prompt, candidates among them."""
    kept: int = 1
    """Images of each prompt that the caller gets."""
    reranker: Any = None


Steps = Generator[Progress, None, Result]


def whole(
    steps: Callable[Concatenate[Owner, P], Steps[Result]],
) -> Callable[Concatenate[Owner, P], Result]:
    """A drawing written as a generator, made a function that runs it to the end and gives what it returns.

    The generator itself stays in reach as ``__wrapped__``; that is what ``stream`` hands out.
    """

    @wraps(steps)
    def run(self: Owner, *args: P.args, **kwargs: P.kwargs) -> Result:
        drawing = steps(self, *args, **kwargs)
        while True:
            try:
                next(drawing)
            except StopIteration as end:
                return end.value

    return run


def refuse_unknown(extras: Mapping[str, Any], known: Any) -> None:
    """Raises TypeError for an argument that is not one of `known`, a ``TypedDict``."""
    names = sorted(known.__required_keys__ | known.__optional_keys__)
    for name in extras:
        if name not in names:
            near = difflib.get_close_matches(name, [*names, "seed", "prompt", "guidance_scale"], n=1)
            raise TypeError(f"unexpected argument {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
