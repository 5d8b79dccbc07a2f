"""One call of a pipeline: what it was asked for, and everything that changes while it runs.

A pipeline holds networks and settings. What a call changes, its scheduler, guidance and interruption, is here, so that
calls in threads, streams that are read in turn and calls within callbacks do not disturb each other. The networks
themselves are shared: threads must not draw at the same time with LoRA scales of their own, or under CPU offloading.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.codec import Codec, Generators
from latentdiff.conditioning import GuidedConditioning
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.call_scheduler import Sampler
from latentdiff.pipelines.core.denoiser import GuidedDenoiser, guidance_embedding
from latentdiff.pipelines.core.noise import NoiseSource, image_generators, image_seeds
from latentdiff.pipelines.core.options import CallOptions, GuidedOptions
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.previews import LatentPreview
from latentdiff.pipelines.core.safety import check_safety
from latentdiff.pipelines.core.sampling import Progress, Steps, denoise

if TYPE_CHECKING:
    from latentdiff.pipelines.core.pipeline import LatentPipeline


class Call:
    """A call that draws ``count`` images, ``per_item`` of each prompt, class or picture.

    Args:
        pipeline: that is called.
        options: what it is asked for.
        items: how many prompts, classes or pictures there are.
        per_item: how many images of each.

    Attributes:
        view: the pipeline as this call's callbacks see it: its components, with this call's scheduler and guidance
            under the names that callbacks for diffusers look for.

    Raises:
        TypeError, ValueError: an option does not fit; the message says which and why.
    """

    def __init__(self, pipeline: "LatentPipeline", options: CallOptions, items: int, per_item: int = 1) -> None:
        self.pipeline, self.options = pipeline, options
        self.items, self.per_item, self.count = items, per_item, items * per_item
        self.device: torch.device = pipeline._execution_device
        self.codec = Codec(pipeline.vae)
        self.sampler = Sampler.of(pipeline.scheduler)
        self.view = pipeline.view_of_call(self.sampler.scheduler)
        if isinstance(options, GuidedOptions):
            self._set_guidance(options)
        self.seeds = None if options.seed is None else image_seeds(options.seed, self.count)
        self.noise = self._noise()

    @property
    def guidance(self) -> ClassifierFreeGuidance:
        """As the options say, or as a callback has changed it since."""
        return self.view.guidance

    def _set_guidance(self, options: GuidedOptions) -> None:
        """Several scales are one for each prompt, or one for each image.

        Raises:
            ValueError: not as many scales as prompts or images; see ``ClassifierFreeGuidance`` for the rest.
        """
        scale = self.pipeline.defaults["guidance_scale"] if options.guidance_scale is None else options.guidance_scale
        if not isinstance(scale, (int, float)):
            scale = tuple(float(one) for one in scale)
            if len(scale) == self.items:
                scale = tuple(one for one in scale for _ in range(self.per_item))
            if len(scale) != self.count:
                raise ValueError(
                    f"{len(scale)} guidance scales were given for {self.count} images; give one for each, or a single "
                    f"one"
                )
        interval = options.guidance_interval
        self.view.set_guidance(
            scale,
            options.guidance_rescale,
            None if interval is None else (float(interval[0]), float(interval[1])),
        )

    def _noise(self) -> NoiseSource:
        """Where the noise of the images comes from."""
        options, strength = self.options, self.options.variation_strength
        if (options.variation_seed is None) != (strength == 0):
            raise ValueError("a variation needs both variation_seed and a variation_strength above 0")
        if not 0 <= strength <= 1:
            raise ValueError(f"variation_strength must lie in [0, 1], not {strength}")
        variation: Generators = None
        if options.variation_seed is not None:
            seeds = image_seeds(options.variation_seed, self.count, "variation_seed")
            variation = image_generators(seeds, None, self.count)
        return NoiseSource(
            image_generators(self.seeds, options.generator, self.count),
            self.device,
            # in float32, so that a seed means the same in all precisions
            self.pipeline.unet.dtype if self.seeds is None else torch.float32,
            variation if isinstance(variation, list) else None,
            strength,
        )

    # From options to where sampling starts

    @cached_property
    def _plan(self) -> tuple[Tensor, int]:
        options, steps = self.options, self.options.num_inference_steps
        steps = self.pipeline.defaults["num_inference_steps"] if steps is None else steps
        timesteps = self.sampler.plan(steps, self.device, options.timesteps, options.sigmas)
        own = options.timesteps is not None or options.sigmas is not None
        return timesteps, len(timesteps) if own else steps

    def timesteps(self, strength: float | None = None) -> Tensor:
        """The steps to run, (S,): all of them, or the last ones for a picture to start from.

        Raises:
            TypeError, ValueError: see `Sampler.plan` and `Sampler.last`.
        """
        timesteps, planned = self._plan
        return timesteps if strength is None else self.sampler.last(timesteps, planned, strength)

    def latents_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of pictures of this size in pixels."""
        return (self.count, self.codec.channels, height // self.codec.factor, width // self.codec.factor)

    def first_latents(self, shape: tuple[int, ...]) -> Tensor:
        """Where sampling from nothing starts: noise, or the latents that were given, in the scheduler's scale.

        Raises:
            ValueError: those given have another shape.
        """
        _ = self._plan  # on which the scheduler's scale depends
        noise = self.noise.first(shape) if self.options.latents is None else check_latents(self.options.latents, shape)
        return (noise.to(self.device) * self.sampler.first_scale).to(self.pipeline.unet.dtype)

    def guidance_condition(self) -> Tensor | None:
        """(B, D), the embedded guidance scale for a network that guides itself; None for others."""
        if not self.pipeline.guides_itself:
            return None
        scale = self.view.guidance_scale
        scales = torch.tensor(scale if isinstance(scale, tuple) else (float(scale),) * self.count)
        embedding = guidance_embedding(scales, self.pipeline.unet.config.time_cond_proj_dim)
        return embedding.to(self.device, self.pipeline.unet.dtype)

    def denoiser(self, conditioning: GuidedConditioning, **options: Any) -> GuidedDenoiser:
        """The network under this call's guidance; ``options`` are `GuidedDenoiser`'s."""
        guidance = self.guidance_condition()
        if guidance is not None:
            conditioning = conditioning.replace(guidance=guidance)
        return GuidedDenoiser(self.pipeline.unet, conditioning, self.guidance, **options)

    # Running

    def draw(
        self,
        denoiser: GuidedDenoiser,
        latents: Tensor,
        timesteps: Tensor,
        after_step: Callable[[Progress], Tensor] | None = None,
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Denoise, decode, and give what the caller asked for.

        Args:
            latents: (B, C, h, w), where to start.
            timesteps: from `timesteps`.
            after_step: makes the latents to go on with of a step's result.
        """
        result = yield from self._run(denoiser, latents, timesteps, after_step)
        return self.finish(result)

    def _run(
        self,
        denoiser: GuidedDenoiser,
        latents: Tensor,
        timesteps: Tensor,
        after_step: Callable[[Progress], Tensor] | None,
    ) -> Steps[Tensor]:
        """The denoising loop, with progress bar and callback; a callback that sets ``_interrupt`` ends it."""
        self._check_callback()
        self.view._num_timesteps = len(timesteps)
        self.pipeline.show_state(self.view)
        colours = LatentPreview(self.pipeline.vae)
        options = self.sampler.step_options(self.noise.generator, self.options.eta)
        with self.pipeline.progress_bar(total=len(timesteps)) as bar:
            for progress in denoise(denoiser, self.sampler, latents, timesteps, **options):
                progress.colours = colours
                if after_step is not None:
                    progress.latents = after_step(progress)
                self._call_back(denoiser, progress)
                latents = progress.latents
                bar.update()
                yield progress
                if self.view._interrupt:
                    break
        self.pipeline.show_state(self.view)
        return latents

    @property
    def _callback_names(self) -> Sequence[str]:
        callback = self.options.callback_on_step_end
        return getattr(callback, "tensor_inputs", self.options.callback_on_step_end_tensor_inputs)

    def _check_callback(self) -> None:
        known = self.pipeline._callback_tensor_inputs
        for name in self._callback_names:
            if name not in known:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs: there is no {name!r}; choose from {', '.join(known)}"
                )

    def _call_back(self, denoiser: GuidedDenoiser, progress: Progress) -> None:
        """Show the callback the tensors it asked for, and take over what it changed."""
        callback = self.options.callback_on_step_end
        if callback is None:
            return
        tensors = self.callback_tensors(denoiser, progress)
        shown = {name: tensors[name] for name in self._callback_names}
        changed = callback(self.view, progress.step, progress.timestep, shown) or {}
        self.take_over(denoiser, changed)
        denoiser.guidance = self.guidance
        denoiser.refresh()
        progress.latents = changed.get("latents", progress.latents)

    def callback_tensors(self, denoiser: GuidedDenoiser, progress: Progress) -> dict[str, Any]:
        """All tensors that a callback may ask for; kinds of calls add their own."""
        negative = denoiser.conditioning.negative if self.guidance.active else None
        return {
            "latents": progress.latents,
            "prompt_embeds": denoiser.joint_states,
            "negative_prompt_embeds": None if negative is None else negative.states,
        }

    def take_over(self, denoiser: GuidedDenoiser, changed: dict[str, Any]) -> None:
        """Go on with what a callback changed, but for the latents; kinds of calls add their own."""
        states = changed.get("prompt_embeds")
        if states is not None and states is not denoiser.joint_states:
            denoiser.conditioning = denoiser.conditioning.with_joint_states(states)

    # From latents to what the caller asked for

    def finish(self, latents: Tensor) -> ImagesOutput | tuple[Any, Any]:
        """Latents (B, C, h, w) to pictures in the form that was asked for."""
        output = ImagesOutput(images=latents, seeds=self.seeds)
        if self.options.output_type != "latent":
            pixels, flags = check_safety(self.pipeline, self.codec.decode(latents))  # (B, 3, H, W)
            output.nsfw_content_detected = flags
            pixels = self.choose(pixels, output)
            output.images = self.pipeline.image_processor.postprocess(
                pixels,
                output_type=self.options.output_type,
                do_denormalize=[not flag for flag in output.nsfw_content_detected or [False] * len(pixels)],
            )
        self.pipeline.maybe_free_model_hooks()
        return output if self.options.return_dict else (output.images, output.nsfw_content_detected)

    def choose(self, pixels: Tensor, output: ImagesOutput) -> Tensor:
        """Pictures (B, 3, H, W), values about [-1, 1] -> those that the caller gets.

        All of them as they are, unless candidates were asked for; a kind of call of one's own may change them here.
        """
        return pixels


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Raises ValueError if given `latents` have another shape."""
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
    return latents
