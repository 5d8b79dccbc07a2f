"""What all latent pipelines share: their components, the run of the steps, the pictures."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.models import AutoencoderKL, FSQModel, GumbelVQModel, IdentityAutoencoder, VQModel
from latentdiff.pipelines import steps
from latentdiff.pipelines.drawing import Drawing, Extras, ImagesOutput, Progress, Steps
from latentdiff.pipelines.folder import FolderPipeline
from latentdiff.pipelines.noise import Generators, NoiseSource, image_generators, image_seeds
from latentdiff.pipelines.previews import LatentPreview
from latentdiff.pipelines.schedulers import without_learned_variance

logger = logging.getLogger(__name__)

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
AnyAutoencoder: TypeAlias = (
    AutoencoderKL
    | VQModel
    | GumbelVQModel
    | FSQModel
    | IdentityAutoencoder
    | diffusers.AutoencoderKL
    | diffusers.VQModel
)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatentPipeline(FolderPipeline):
    """A UNet, a scheduler, an autoencoder, and whatever conditions the UNet; subclasses add that and the call.

    A call is a generator behind `drawing.whole`: called, it runs to the end; `stream` goes through it step by step.
    """

    vae: Any
    unet: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any

    _exclude_from_cpu_offload: ClassVar[list[str]] = ["safety_checker"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def register_parts(self, scheduler: Any, **parts: Any) -> None:
        """To be called by every ``__init__``: registers the components and sets up what a call needs.

        Raises:
            ValueError: components that do not fit together.
        """
        if parts.get("safety_checker") is not None and parts.get("feature_extractor") is None:
            raise ValueError("a safety_checker needs its feature_extractor")
        self.register_modules(scheduler=without_learned_variance(scheduler), **parts)
        vae = self.vae  # None in a pipeline that only encodes prompts
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, vae_latent_channels=4 if vae is None else vae.config.latent_channels
        )
        self._guidance_scale: float | tuple[float, ...] = 1.0
        self._guidance_rescale = 0.0
        self._guidance_interval: tuple[float, float] | None = None
        self._clip_skip: int | None = None
        self._num_timesteps, self._interrupt = 0, False

    # The state of a call, under the names that callbacks made for diffusers look for

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
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def guidance(self) -> ClassifierFreeGuidance:
        scale = 1.0 if self.guides_itself else self._guidance_scale
        return ClassifierFreeGuidance(scale, self._guidance_rescale, self._guidance_interval)

    @property
    def guides_itself(self) -> bool:
        """Whether the UNet was taught to give guided predictions, and is told the scale (LCM)."""
        return getattr(self.unet.config, "time_cond_proj_dim", None) is not None

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance.active

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al. 2023) in the UNet; usual for Stable Diffusion 1: s1=0.9, s2=0.2, b1=1.2, b2=1.4."""
        self.unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        self.unet.disable_freeu()

    # Steps that need a pipeline

    def stream(self, *args: Any, **call: Any) -> Iterator[Progress]:
        """Draw step by step: takes what a call takes, and yields after every step.

        ::

            for progress in pipeline.stream("a red car", seed=0):
                progress.preview()[0].resize((256, 256)).show()
            progress.output.images[0].save("car.png")

        When the pictures are decoded the last ``Progress`` comes once more, with them as ``output``. Whoever stops
        early stops the drawing.
        """
        drawing = type(self).__call__.__wrapped__(self, *args, **call)  # type: ignore[attr-defined]
        progress = None
        while True:
            try:
                progress = next(drawing)
            except StopIteration as end:
                output = end.value if isinstance(end.value, ImagesOutput) else ImagesOutput(*end.value)
                if progress is not None:
                    yield replace(progress, output=output)
                return
            yield progress

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width to draw; by default what the UNet was trained on.

        Raises:
            ValueError: a side is no multiple of the autoencoder's factor, or there is no default.
        """
        if height is None or width is None:
            sample_size = self.unet.config.sample_size
            if sample_size is None:
                raise ValueError("this model's config has no sample_size; give height and width")
            own = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
            height = own[0] * self.vae_scale_factor if height is None else height
            width = own[1] * self.vae_scale_factor if width is None else width
        steps.check_size(height, width, self.vae_scale_factor)
        return height, width

    def latents_shape(self, count: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return (count, self.vae.config.latent_channels, height // factor, width // factor)

    def plan_steps(
        self, num_inference_steps: int | None, timesteps: Sequence[int] | None = None, sigmas: Any = None
    ) -> tuple[Tensor, int]:
        """The scheduler's timesteps (S,), and how many steps that is as the caller counts them."""
        if num_inference_steps is None:
            num_inference_steps = self.defaults["num_inference_steps"]
        schedule = steps.set_timesteps(self.scheduler, num_inference_steps, self._execution_device, timesteps, sigmas)
        own = timesteps is not None or sigmas is not None
        return schedule, len(schedule) if own else num_inference_steps

    def check_channels(self, condition: int, lacking: str) -> None:
        """Whether UNet, autoencoder and scheduler fit a call that gives `condition` channels besides the latents.

        Learned variances are brought in line, after UNet or scheduler were replaced.

        Raises:
            ValueError: they do not; `lacking` tells what a UNet with other channels is for.
        """
        takes, has = self.unet.config.in_channels, self.vae.config.latent_channels
        if takes != has + condition:
            further = f" and {condition} further ones are given" if condition else ""
            raise ValueError(
                f"the UNet takes {takes} channels and the autoencoder's latents have {has}{further}; {lacking}"
            )
        scheduler = without_learned_variance(self.scheduler)
        if scheduler is not self.scheduler:
            self.scheduler = scheduler
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

    def set_guidance(
        self,
        guidance_scale: float | Sequence[float] | None,
        guidance_rescale: float,
        interval: tuple[float, float] | None,
        prompts: int,
        images_per_prompt: int,
    ) -> None:
        """Set how a call is guided. Several scales are one for each prompt, or one for each image.

        Raises:
            ValueError: not as many scales as prompts or images; see ``ClassifierFreeGuidance`` for the rest.
        """
        scale = self.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        if not isinstance(scale, (int, float)):
            scale = tuple(float(one) for one in scale)
            if len(scale) == prompts:
                scale = tuple(one for one in scale for _ in range(images_per_prompt))
            if len(scale) != prompts * images_per_prompt:
                raise ValueError(
                    f"{len(scale)} guidance scales were given for {prompts * images_per_prompt} images; give one for "
                    f"each, or a single one"
                )
        self._guidance_scale, self._guidance_rescale = scale, guidance_rescale
        self._guidance_interval = None if interval is None else (float(interval[0]), float(interval[1]))
        _ = self.guidance  # checks the values

    def noise_source(
        self, count: int, seed: int | Sequence[int] | None, generator: Generators, extras: Extras
    ) -> tuple[NoiseSource, list[int] | None]:
        """Where the noise of a call's `count` images comes from, and their seeds.

        Raises:
            TypeError, ValueError: seeds or generators do not fit the images, or each other.
        """
        seeds = None if seed is None else image_seeds(seed, count)
        other, strength = extras.get("variation_seed"), extras.get("variation_strength", 0.0)
        if (other is None) != (strength == 0):
            raise ValueError("a variation needs both variation_seed and a variation_strength above 0")
        if not 0 <= strength <= 1:
            raise ValueError(f"variation_strength must lie in [0, 1], not {strength}")
        variation = None
        if other is not None:
            variation = image_generators(image_seeds(other, count, "variation_seed"), None, count)
        source = NoiseSource(
            image_generators(seeds, generator, count),
            self._execution_device,
            self.unet.dtype if seeds is None else torch.float32,  # so that a seed means the same in all precisions
            variation if isinstance(variation, list) else None,
            strength,
        )
        return source, seeds

    def first_latents(self, drawing: Drawing, shape: tuple[int, ...], given: Tensor | None) -> Tensor:
        """Where a drawing from nothing starts: noise, or what is given for it, in the scheduler's scale; of `shape`.

        Raises:
            ValueError: what is given has another shape.
        """
        noise = drawing.noise.first(shape) if given is None else steps.check_latents(given, shape)
        return (noise.to(self._execution_device) * self.scheduler.init_noise_sigma).to(self.unet.dtype)

    def denoiser(self, drawing: Drawing, **conditions: Any) -> steps.GuidedDenoiser:
        """The UNet with all that a drawing conditions it on; ``conditions`` are `GuidedDenoiser`'s."""
        return steps.GuidedDenoiser(self.unet, drawing.embeds, self.guidance, **conditions, **self.own_scale(drawing))

    def own_scale(self, drawing: Drawing) -> dict[str, Tensor]:
        """What a UNet that guides itself is told of the guidance scale."""
        if not self.guides_itself:
            return {}
        scale = self._guidance_scale
        scales = torch.tensor(scale if isinstance(scale, tuple) else (float(scale),) * drawing.count)
        embedding = steps.guidance_embedding(scales, self.unet.config.time_cond_proj_dim)
        return {"timestep_cond": embedding.to(self._execution_device, self.unet.dtype)}

    def run_steps(
        self,
        denoiser: steps.GuidedDenoiser,
        latents: Tensor,
        timesteps: Tensor,
        callback: StepCallback | None = None,
        callback_tensors: Sequence[str] = ("latents",),
        after_step: Callable[[steps.DenoisingState], Tensor] | None = None,
        **options: Any,
    ) -> Steps[Tensor]:
        """The denoising loop, with progress bar and callback; setting ``_interrupt`` in the callback ends it.

        Args:
            after_step: makes the latents to go on with of what a step gives.
            options: for the scheduler's ``step``.

        Returns:
            The latents after the last step.
        """
        callback_tensors = getattr(callback, "tensor_inputs", callback_tensors)
        for name in callback_tensors:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs: there is no {name!r}; "
                    f"choose from {', '.join(self._callback_tensor_inputs)}"
                )
        self._interrupt, self._num_timesteps = False, len(timesteps)
        colours = LatentPreview(self.vae)
        with self.progress_bar(total=len(timesteps)) as bar:
            for state in steps.denoise(denoiser, self.scheduler, latents, timesteps, **options):
                if after_step is not None:
                    state.latents = after_step(state)
                if callback is not None:
                    state.latents = self._call_back(callback, callback_tensors, denoiser, state)
                latents = state.latents
                bar.update()
                assert state.scaled is not None
                assert state.prediction is not None
                yield Progress(
                    state.index,
                    len(timesteps),
                    state.timestep,
                    latents,
                    scheduler=self.scheduler,
                    scaled=state.scaled,
                    prediction=state.prediction,
                    colours=colours,
                )
                if self._interrupt:
                    break
        return latents

    def callback_tensors(self, denoiser: steps.GuidedDenoiser, state: steps.DenoisingState) -> dict[str, Any]:
        """All tensors that a callback may ask for."""
        embeds = denoiser.prompt_embeds
        negative = embeds.chunk(2)[0] if self.guidance.active else None
        return {"latents": state.latents, "prompt_embeds": embeds, "negative_prompt_embeds": negative}

    def take_over(self, denoiser: steps.GuidedDenoiser, changed: dict[str, Any]) -> None:
        """Go on with what a callback changed, but for the latents."""
        embeds = changed.get("prompt_embeds")
        if embeds is not None and embeds is not denoiser.prompt_embeds:
            denoiser.prompt_embeds = embeds
        denoiser.guidance = self.guidance

    def _call_back(
        self, callback: StepCallback, names: Sequence[str], denoiser: steps.GuidedDenoiser, state: steps.DenoisingState
    ) -> Tensor:
        """Show the callback the tensors it asked for, and take over what it changed. Returns the latents."""
        tensors = self.callback_tensors(denoiser, state)
        changed = callback(self, state.index, state.timestep, {name: tensors[name] for name in names}) or {}
        self.take_over(denoiser, changed)
        return changed.get("latents", state.latents)

    def finish(self, drawing: Drawing, latents: Tensor) -> ImagesOutput | tuple[Any, Any]:
        """Latents (B, C, h, w) to what the caller asked for."""
        flags, scores, seeds = None, None, drawing.seeds
        if drawing.output_type == "latent":
            images = latents
        else:
            pixels, flags = self._check_safety(steps.decode(self.vae, latents))  # (B, 3, H, W)
            if drawing.reranker is not None:
                best, scores = self._best(drawing, pixels, flags)
                pixels = pixels[best]
                flags = None if flags is None else [flags[i] for i in best]
                seeds = None if seeds is None else [seeds[i] for i in best]
            images = self.image_processor.postprocess(
                pixels,
                output_type=drawing.output_type,
                do_denormalize=[not flag for flag in flags or [False] * len(pixels)],
            )
        self.maybe_free_model_hooks()
        if not drawing.return_dict:
            return images, flags
        return ImagesOutput(images=images, nsfw_content_detected=flags, seeds=seeds, scores=scores)

    def _check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Blacken what the safety checker objects to, if there is one, and say so."""
        if self.safety_checker is None:
            return pixels, None
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        seen = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(pixels)
        pixels, flags = self.safety_checker(images=pixels, clip_input=seen)
        withheld = [i for i, flag in enumerate(flags) if flag]
        if withheld:
            logger.warning(
                "The model's safety checker withheld %d of %d images, black now: number %s, counted from 0",
                *(len(withheld), len(flags), ", ".join(map(str, withheld))),
            )
        return pixels, flags

    def _best(self, drawing: Drawing, pixels: Tensor, withheld: list[bool] | None) -> tuple[list[int], list[float]]:
        """Which of a call's candidates to keep, and their scores."""
        from latentdiff.pipelines.reranking import best_of

        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        prompts = drawing.prompts or []
        candidates = drawing.count // len(prompts)
        return best_of(pictures, prompts, candidates, drawing.kept, drawing.reranker, withheld)


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")


def check_count(given: int | None, name: str = "num_images_per_prompt") -> int:
    count = 1 if given is None else given
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a whole number from 1, not {given!r}")
    return count
