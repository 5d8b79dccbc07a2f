"""What all latent pipelines share: their components, and what can be asked of them apart from a call."""

import copy
import math
from collections.abc import Hashable, Iterator
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias
from weakref import WeakSet

import diffusers
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from latentdiff.codec import Codec
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.memory import DRAWING, memory_advice
from latentdiff.models import AutoencoderKL, AutoencoderTiny, FSQModel, GumbelVQModel, IdentityAutoencoder, VQModel
from latentdiff.pipelines.core.call_options import whole_number
from latentdiff.pipelines.core.input_pictures import Pictures, Placement, ResizeMode, as_list, place
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Progress, without_learned_variance
from latentdiff.pipelines.storage.folder import FolderPipeline

if TYPE_CHECKING:
    from latentdiff.pipelines.core.optimizing import Optimization
    from latentdiff.pipelines.core.step_runner import StepRunner

AnyAutoencoder: TypeAlias = (
    AutoencoderKL
    | VQModel
    | GumbelVQModel
    | FSQModel
    | IdentityAutoencoder
    | AutoencoderTiny
    | diffusers.AutoencoderKL
    | diffusers.AutoencoderTiny
    | diffusers.VQModel
)

FEW_STEPS = 8
"""What a distilled model draws in at most; see `LatentPipeline.made_for_steps`."""

_STARTING = Lock()
"""Held while the set of running calls is read or changed."""


class LatentPipeline(FolderPipeline):
    """A UNet, a scheduler, an autoencoder, and whatever conditions the UNet; subclasses add that and the call.

    A call is a generator behind `sampling.whole`: called, it runs to the end; `stream` goes through it step by step. It
    has a copy of the pipeline, its view, whose state it reads and changes, under the names that callbacks made for
    diffusers look for; the pipeline itself shows the state of the call that began or ended last.
    """

    vae: Any
    unet: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any
    image_processor: VaeImageProcessor

    preview_autoencoder: Any = None
    """A small stand-in for ``vae``, of the same latents (`AutoencoderTiny`), that draws previews at their full size."""

    step_runner: "StepRunner | None" = None
    """Runs the UNet's steps; None: they run as they are."""

    _exclude_from_cpu_offload: ClassVar[list[str]] = ["safety_checker"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    draws_any_size: ClassVar[bool] = False
    """Whether pictures of other sizes than in training are as good."""

    _guidance_scale: float | tuple[float, ...] = 1.0
    _guidance_rescale: float = 0.0
    _guidance_interval: tuple[float, float] | None = None
    _clip_skip: int | None = None
    _num_timesteps: int = 0

    def register_parts(self, scheduler: Any, **parts: Any) -> None:
        """To be called by every ``__init__``: registers the components and sets up what a call needs.

        scheduler: None: a kind that draws without one.

        Raises:
            ValueError: components that do not fit together.
        """
        if parts.get("safety_checker") is not None and parts.get("feature_extractor") is None:
            raise ValueError("a safety_checker needs its feature_extractor")
        if scheduler is not None:
            parts = {"scheduler": without_learned_variance(scheduler), **parts}
        self.register_modules(**parts)
        vae = self.vae  # None in a pipeline that only encodes prompts
        self.vae_scale_factor = 8 if vae is None else Codec(vae).factor
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, vae_latent_channels=4 if vae is None else vae.config.latent_channels
        )
        self._running: WeakSet[LatentPipeline] | None = WeakSet()
        self._stopped = False
        self.warned_of: set[Hashable] = set()

    @property
    def side_factor(self) -> int:
        """What height and width are multiples of, in pixels."""
        return self.vae_scale_factor

    # Calls

    @property
    def guidance_scale(self) -> float | tuple[float, ...]:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        return self._clip_skip

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def guidance(self) -> ClassifierFreeGuidance:
        scale = 1.0 if self.guides_itself else self._guidance_scale
        return ClassifierFreeGuidance(scale, self._guidance_rescale, self._guidance_interval)

    @property
    def guides_itself(self) -> bool:
        """Whether the UNet was trained to give guided predictions, and takes the scale as a condition (LCM)."""
        return getattr(self.unet.config, "time_cond_proj_dim", None) is not None

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance.active

    def set_guidance(
        self, scale: float | tuple[float, ...], rescale: float = 0.0, interval: tuple[float, float] | None = None
    ) -> None:
        """Raises ValueError for values that ``ClassifierFreeGuidance`` does not take."""
        self._guidance_scale, self._guidance_rescale, self._guidance_interval = scale, rescale, interval
        _ = self.guidance  # checks them

    def view_of_call(self, scheduler: Any) -> Self:
        """The pipeline as one call sees it: the same components, but for the scheduler, and a state of its own."""
        view = copy.copy(self)
        view.__dict__.update(scheduler=scheduler, _running=None, _stopped=False)
        with _STARTING:
            if self._running is not None:
                self._stopped = False
                self._running.add(view)
        return view

    def show_state(self, view: Self) -> None:
        """Show the state of a call here, unless this is the view of another one, from whose callback it was made."""
        if self._running is not None:
            self.set_guidance(view._guidance_scale, view._guidance_rescale, view._guidance_interval)
            self._clip_skip, self._num_timesteps = view._clip_skip, view._num_timesteps

    @property
    def _interrupt(self) -> bool:
        """Set in a callback it ends that call after the step, set on the pipeline all calls that are running."""
        return self._stopped

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._stopped = value
        with _STARTING:
            for view in list(self._running or ()):
                view._stopped = value

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def stream(self, *args: Any, **call: Any) -> Iterator[Progress]:
        """Draw step by step: takes what a call takes, and yields after every step.

        ::

            for progress in pipeline.stream("a red car", seed=0):
                progress.preview()[0].resize((256, 256)).show()
            progress.output.images[0].save("car.png")

        When the pictures are decoded the last ``Progress`` comes once more, with them as ``output``. Leaving the loop
        early stops the drawing.
        """
        drawing = type(self).__call__.__wrapped__(self, *args, **call)  # type: ignore[attr-defined]
        progress = None
        while True:
            try:
                with memory_advice(DRAWING):
                    progress = next(drawing)
            except StopIteration as end:
                output = end.value if isinstance(end.value, ImagesOutput) else ImagesOutput(*end.value)
                if progress is not None:
                    yield replace(progress, output=output)
                return
            yield progress

    def optimize(
        self, *, max_error: float = 0.02, compiled: bool = False, again: bool = False, **call: Any
    ) -> "Optimization":
        """Draw as fast as this machine can, from now on: tries a few ways for some seconds and keeps what pays.

        ::

            print(pipeline.optimize(prompt="a red car"))

        Tried are, on a processor, numbers of threads (torch's, for the whole process), channels-last, and, where it has
        it, bfloat16; on a GPU float16, channels-last, and steps as CUDA graphs, one for each shape. What was found is
        remembered in the user's cache for these weights, this call, machine, torch and as many free cores (all, half,
        fewer), and taken without trying next time. ``unet`` may become a copy in another precision, as which it is
        then saved. Pipelines made of this one by ``from_pipe`` share it, and have graphs after an `optimize` of their
        own.

        Args:
            max_error: how far predictions may be from what they were, as a share of their size. 0: only what changes
                nothing.
            compiled: try ``torch.compile`` too, on a processor with packed weights, which takes a minute or so; sizes
                other than the call's are compiled anew.
            again: try, whatever is remembered.
            call: a call such as will be made: prompt, size, guidance, pictures at once.

        Returns:
            What was tried and chosen, in words as a text.

        Raises:
            ValueError: the UNet is on neither a processor nor a CUDA GPU, or offloaded from it; it is compiled or run
                by another runtime; or `max_error` is no share.
        """
        from latentdiff.pipelines.core.optimizing import optimize

        return optimize(self, call, max_error, compiled, again)

    # What fits this model

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width to draw; by default what the UNet was trained on.

        Raises:
            ValueError: a side is no whole number, or no multiple of the autoencoder's factor, or there is no default.
        """
        if height is None or width is None:
            own = self.trained_size
            if own is None:
                raise ValueError("this model's config has no sample_size; give height and width")
            height, width = (own[0] if height is None else height), (own[1] if width is None else width)
        return check_side("height", height, self.side_factor), check_side("width", width, self.side_factor)

    def placement(
        self, image: Pictures, height: int | None = None, width: int | None = None, mode: ResizeMode = "crop"
    ) -> Placement:
        """At which size to draw from given pictures, and what is shown of them: see `input_pictures.place`.

        With `mode` "default" they are not brought near the size that the UNet was trained on. No call warns of a size
        that the rule chose.

        Raises:
            TypeError, ValueError: as there; a side is no whole number, or no multiple of the autoencoder's factor.
        """
        if height is not None:
            height = check_side("height", height, self.side_factor)
        if width is not None:
            width = check_side("width", width, self.side_factor)
        trained = None if self.draws_any_size or mode == "default" else self.trained_size
        placed = place(self.image_processor, image, height, width, trained, mode)
        if trained is not None and len(set(placed.sizes)) == 1 and not isinstance(as_list(image)[0], Tensor):
            chosen = place(self.image_processor, image, trained=trained)  # maybe by us, and then given
            if (chosen.height, chosen.width) == (placed.height, placed.width):
                self.warned_of.add((placed.height, placed.width))
        return placed

    @property
    def trained_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the UNet was trained on; None if its config does not say."""
        size = self.unet.config.sample_size
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def made_for_steps(self) -> int | None:
        """The steps that a distilled model was made for; None: it was not, and more steps are as good or better.

        Known by the defaults in its folder: at most `FEW_STEPS`, without guidance or with a UNet that guides itself.
        """
        steps = self.registered_defaults.get("num_inference_steps", FEW_STEPS + 1)
        alone = self.guides_itself or self.registered_defaults.get("guidance_scale", math.inf) <= 1
        return int(steps) if alone and steps <= FEW_STEPS else None

    def check_channels(self, condition: int, lacking: str) -> None:
        """Whether UNet, autoencoder and scheduler fit a call that gives `condition` channels besides the latents.

        Raises:
            ValueError: they do not; `lacking` says what a UNet with other channels is for.
        """
        takes, has = self.unet.config.in_channels, self.vae.config.latent_channels
        if takes != has + condition:
            further = f" and {condition} further ones are given" if condition else ""
            raise ValueError(
                f"the UNet takes {takes} channels and the autoencoder's latents have {has}{further}; {lacking}"
            )
        scheduler = without_learned_variance(self.scheduler)
        gives = self.unet.config.out_channels
        if gives not in (has, 2 * has):
            raise ValueError(
                f"the UNet gives {gives} channels; for latents with {has} it must be {has}, or "
                f"{2 * has} with learned variances"
            )
        if gives == has and takes_variance(scheduler):
            raise ValueError(
                f"the scheduler has variance_type='learned_range' and the UNet gives {gives} channels, without "
                f"variances; replace it by {type(scheduler).__name__}.from_config(pipeline.scheduler.config, "
                f"variance_type='fixed_small')"
            )

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al. 2023) in the UNet; usual for Stable Diffusion 1: s1=0.9, s2=0.2, b1=1.2, b2=1.4."""
        self.unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        self.unet.disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Let attention compute queries, keys and values by one product, see `Network.fuse_qkv_projections`."""
        for network, chosen in ((self.unet, unet), (self.vae, vae)):
            if chosen:
                network.fuse_qkv_projections()

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        for network, chosen in ((self.unet, unet), (self.vae, vae)):
            if chosen:
                network.unfuse_qkv_projections()


def check_side(name: str, value: Any, factor: int) -> int:
    """The side of a picture. Raises ValueError, with the nearest good ones, if latents of 1/`factor` cannot have it."""
    try:
        side = whole_number(value, name)
    except TypeError:
        raise ValueError(f"{name}={value!r} is no whole number of pixels") from None
    if side < 1 or side % factor:
        below = side // factor * factor
        near = " or ".join(str(size) for size in (below, below + factor) if size > 0)
        raise ValueError(f"{name}={side} is not a multiple of {factor}; the nearest that this model draws: {near}")
    return side
