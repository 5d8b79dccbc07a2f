"""One call of a pipeline: what it was asked for, and everything that changes while it runs.

A pipeline holds networks and settings. What a call changes, its scheduler, guidance and interruption, is here, so that
calls in threads, streams that are read in turn and calls within callbacks do not disturb each other. The networks
themselves are shared: one with LoRAs is run by one thread after the other, for each call may have a LoRA scale of its
own; under CPU offloading threads must not draw at the same time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from latentdiff.codec import Codec, Generators
from latentdiff.conditioning import GuidedConditioning
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.call_options import CallOptions, GuidedOptions, Seeds
from latentdiff.pipelines.core.denoiser import GuidedDenoiser, guidance_embedding
from latentdiff.pipelines.core.output import ImagesOutput, check_safety, report_faults
from latentdiff.pipelines.core.previews import preview_of
from latentdiff.pipelines.core.remarks import remark_on_guidance, remark_on_size, remark_on_steps, warn_once
from latentdiff.pipelines.core.sampling import Progress, Sampler, Steps, denoise

if TYPE_CHECKING:
    from latentdiff.pipelines.core.pipeline import LatentPipeline

ENCODERS = ("text_encoder", "image_encoder")
"""Components that make what conditions the UNet."""


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
        faults: images for which a network gave values that are not finite, and which network did so first.

    Raises:
        TypeError, ValueError: an option does not fit; the message says which and why.
    """

    codec_class: ClassVar[type[Codec]] = Codec

    def __init__(self, pipeline: "LatentPipeline", options: CallOptions, items: int, per_item: int = 1) -> None:
        self.pipeline, self.options = pipeline, options
        self.items, self.per_item, self.count = items, per_item, items * per_item
        self.device: torch.device = pipeline._execution_device
        self.codec = self.codec_class(pipeline.vae)
        self.sampler = Sampler.of(pipeline.scheduler)
        self.view = pipeline.view_of_call(self.sampler.scheduler)
        if isinstance(options, GuidedOptions):
            scale = self._guidance_scale(options)
            self.view.set_guidance(scale, options.guidance_rescale, options.guidance_interval)
            largest = max(scale) if isinstance(scale, tuple) else scale
            warn_once(pipeline, "guidance", remark_on_guidance(pipeline, largest))
        self.seeds = image_seeds(options.seed, self.count)
        self.generator = image_generators(self.seeds, options.generator, self.count)
        self.variation = self._variation()
        self.planned = self._plan()
        self.faults: dict[int, str] = {}

    @property
    def guidance(self) -> ClassifierFreeGuidance:
        """As the options say, or as a callback has changed it since."""
        return self.view.guidance

    def _guidance_scale(self, options: GuidedOptions) -> float | tuple[float, ...]:
        """One for all images, or one for each."""
        scale = self.pipeline.defaults["guidance_scale"] if options.guidance_scale is None else options.guidance_scale
        if not isinstance(scale, tuple):
            return scale
        if len(scale) == self.items:
            scale = tuple(one for one in scale for _ in range(self.per_item))
        if len(scale) != self.count:
            raise ValueError(
                f"{len(scale)} guidance scales were given for {self.count} images; give one for each, or a single one"
            )
        return scale

    # Noise

    def _variation(self) -> list[Generator] | None:
        """Generators of the noise that is mixed into the first one."""
        options, strength = self.options, self.options.variation_strength
        if (options.variation_seed is None) != (strength == 0):
            raise ValueError("a variation needs both variation_seed and a variation_strength above 0")
        if not 0 <= strength <= 1:
            raise ValueError(f"variation_strength must lie in [0, 1], not {strength}")
        seeds = image_seeds(options.variation_seed, self.count, "variation_seed")
        return None if seeds is None else [Generator().manual_seed(one) for one in seeds]

    def noise(self, shape: tuple[int, ...], generator: Generators = None) -> Tensor:
        """Standard normal noise of `shape`, (B, ...), on the call's device, drawn where its generators are.

        With seeds it is drawn in float32, so that a seed means the same in all precisions.
        """
        dtype = self.noise_dtype or self.pipeline.unet.dtype
        return randn_tensor(shape, generator=generator or self.generator, device=self.device, dtype=dtype)

    @property
    def noise_dtype(self) -> torch.dtype | None:
        """In which noise is drawn, where not in a network's own precision."""
        return None if self.seeds is None else torch.float32

    def first_noise(self, shape: tuple[int, ...]) -> Tensor:
        """The noise that decides what the pictures look like, with the variation in it; or the latents given for it.

        Raises:
            ValueError: those given have another shape.
        """
        given = self.options.latents
        if given is not None:
            return check_latents(given, shape)
        noise = self.noise(shape)
        if self.variation is None:
            return noise
        return spherical_mix(noise, self.noise(shape, self.variation), self.options.variation_strength)

    # From options to where sampling starts

    def _plan(self) -> tuple[Tensor, int]:
        """All timesteps, and how many were asked for; the scheduler's scale depends on it."""
        options, steps = self.options, self.options.num_inference_steps
        own = options.timesteps is not None or options.sigmas is not None
        if steps is not None and not own:
            warn_once(self.pipeline, "steps", remark_on_steps(self.pipeline, steps))
        steps = self.pipeline.defaults["num_inference_steps"] if steps is None else steps
        timesteps = self.sampler.plan(steps, self.device, options.timesteps, options.sigmas)
        return timesteps, len(timesteps) if own else steps

    def timesteps(self, strength: float | None = None) -> Tensor:
        """The steps to run, (S,): all of them, or the last ones for a picture to start from.

        Raises:
            ValueError: see `Sampler.last`.
        """
        timesteps, planned = self.planned
        return timesteps if strength is None else self.sampler.last(timesteps, planned, strength)

    def latents_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(B, C, h, w) of pictures of this size in pixels."""
        return (self.count, self.codec.channels, height // self.codec.factor, width // self.codec.factor)

    def first_latents(self, shape: tuple[int, ...]) -> Tensor:
        """Where sampling from nothing starts: `first_noise` in the scheduler's scale."""
        return self.sampler.from_noise(self.first_noise(shape).to(self.device)).to(self.pipeline.unet.dtype)

    def denoiser(self, conditioning: GuidedConditioning, **options: Any) -> GuidedDenoiser:
        """The network under this call's guidance; ``options`` are `GuidedDenoiser`'s.

        A network that guides itself has the embedded guidance scale, (B, D), as a further condition.
        """
        unet = self.pipeline.unet
        if self.pipeline.guides_itself:
            scale = self.view.guidance_scale
            scales = torch.tensor(scale if isinstance(scale, tuple) else (float(scale),) * self.count)
            embedding = guidance_embedding(scales, unet.config.time_cond_proj_dim)
            conditioning = conditioning.replace(guidance=embedding.to(self.device, unet.dtype))
        return GuidedDenoiser(unet, conditioning, self.guidance, runner=self.pipeline.step_runner, **options)

    # Running

    def draw(
        self,
        denoiser: GuidedDenoiser,
        latents: Tensor,
        timesteps: Tensor,
        after_step: Callable[[Progress], Tensor] | None = None,
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Denoise, decode, and give what the caller asked for; a callback that sets ``_interrupt`` ends the denoising.

        Args:
            latents: (B, C, h, w), where to start.
            timesteps: from `timesteps`.
            after_step: makes the latents to go on with of a step's result.
        """
        encoder = next((name for name in ENCODERS if getattr(self.pipeline, name, None) is not None), "unet")
        for part in (denoiser.conditioning.positive, denoiser.conditioning.negative):
            self.note_faults(encoder, None if part is None else part.states)
        self.note_faults("vae", latents)  # of a picture to start from
        _ = self._callback_names  # checks them
        height, width = (side * self.codec.factor for side in latents.shape[-2:])
        warn_once(self.pipeline, (height, width), remark_on_size(self.pipeline, height, width))
        self.view._num_timesteps = len(timesteps)
        self.pipeline.show_state(self.view)
        colours = preview_of(self.pipeline.vae, self.pipeline.preview_autoencoder)
        with self.pipeline.progress_bar(total=len(timesteps)) as bar:
            for progress in self.steps(denoiser, latents, timesteps):
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
        self.note_faults("unet", latents)
        return self.finish(latents)

    def steps(self, denoiser: GuidedDenoiser, latents: Tensor, timesteps: Tensor) -> Iterator[Progress]:
        """The loop of `draw`; a kind of call that draws in another way has its own."""
        options = self.sampler.step_options(self.generator, self.options.eta)
        return denoise(denoiser, self.sampler, latents, timesteps, **options)

    @cached_property
    def _callback_names(self) -> Sequence[str]:
        """The tensors that the callback asks for. Raises ValueError if there is one that it cannot have."""
        asked, known = self.options.callback_on_step_end_tensor_inputs, self.pipeline._callback_tensor_inputs
        names = getattr(self.options.callback_on_step_end, "tensor_inputs", asked)
        for name in set(names) - set(known):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: there is no {name!r}; choose from {', '.join(known)}"
            )
        return names

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

    def note_faults(self, network: str, made: Tensor | None) -> None:
        """Remember for which images this network was the first to give values that are not finite.

        Args:
            made: (B, ...), what it gave.
        """
        if made is not None and not made.isfinite().all():
            for i in (~made.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
                self.faults.setdefault(i, network)

    def finish(self, latents: Tensor) -> ImagesOutput | tuple[Any, Any]:
        """Latents (B, C, h, w) to pictures in the form that was asked for."""
        output = ImagesOutput(images=latents, seeds=self.seeds)
        kind = self.options.output_type
        pixels = None if kind == "latent" else self.codec.decode(latents)  # (B, 3, H, W)
        self.note_faults("vae", pixels)
        if self.faults:
            report_faults(self.pipeline, self.faults, self.count)
            output.nan_detected = [i in self.faults for i in range(self.count)]
        if pixels is not None:
            if self.faults and kind == "pil":  # which has no NaN; arrays keep it
                pixels = torch.where(torch.tensor(output.nan_detected).to(pixels.device).view(-1, 1, 1, 1), -1, pixels)
            pixels, output.nsfw_content_detected = check_safety(self.pipeline, pixels)
            pixels = self.choose(pixels, output)
            raw = output.nsfw_content_detected or [False] * len(pixels)  # the checker's black is 0, not -1
            output.images = self.pipeline.image_processor.postprocess(
                pixels, output_type=kind, do_denormalize=[not flag for flag in raw]
            )
        self.pipeline.maybe_free_model_hooks()
        return output if self.options.return_dict else (output.images, output.nsfw_content_detected)

    def choose(self, pixels: Tensor, output: ImagesOutput) -> Tensor:
        """Pictures (B, 3, H, W), values about [-1, 1] -> those that the caller gets.

        All of them as they are, unless candidates were asked for; a kind of call of one's own may change them here.
        """
        return pixels


def check_latents(latents: Tensor, shape: tuple[int, ...], name: str = "latents") -> Tensor:
    """Raises ValueError if `latents` have another shape."""
    if tuple(latents.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {tuple(latents.shape)}")
    return latents


def image_seeds(seed: Seeds, count: int, name: str = "seed") -> list[int] | None:
    """The seeds of `count` images: ``seed + i``, or the i-th of several.

    Raises:
        ValueError: not as many as images, or one that no generator takes.
    """
    if seed is None:
        return None
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} {name}s were given for {count} images; give one for each, or a single one")
    for one in seeds:
        if not 0 <= one < 2**63:
            raise ValueError(f"a {name} must lie in [0, 2**63 - 1], not {one}")
    return seeds


def image_generators(seeds: Sequence[int] | None, generator: Generators, count: int) -> Generators:
    """The random generators of `count` images.

    With `seeds`, every image has a generator of its own, on the CPU, so its picture depends neither on the batch around
    it nor on the device. Without, `generator` is used.

    Raises:
        ValueError: seeds and a generator, or not as many generators as images.
    """
    if seeds is None:
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} images; give one for each")
        return generator
    if generator is not None:
        raise ValueError("give either seed or generator, not both")
    return [Generator().manual_seed(one) for one in seeds]


def spherical_mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From `a` (share 0) to `b` (share 1) on the great circle through both, image by image (Shoemake 1985, slerp).

    A straight mix of two noises would have less variance than either.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b).clamp(-1, 1)
    angle = torch.arccos(cosine)[:, None]  # (B, 1)
    straight = angle.abs() < 1e-4
    sine = torch.where(straight, torch.ones_like(angle), torch.sin(angle))
    weight_a = torch.where(straight, torch.full_like(angle, 1 - share), torch.sin((1 - share) * angle) / sine)
    weight_b = torch.where(straight, torch.full_like(angle, share), torch.sin(share * angle) / sine)
    return (weight_a * flat_a + weight_b * flat_b).view_as(a).to(a.dtype)
