"""What all latent pipelines share: their components, the run of the steps, the pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor

from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.schedulers import takes_variance
from latentdiff.models import AutoencoderKL, UNet2DConditionModel, VQModel
from latentdiff.pipelines import steps
from latentdiff.pipelines.adapters import AdapterPipeline
from latentdiff.pipelines.folder import FolderPipeline

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@dataclass
class ImagesOutput(BaseOutput):
    """Pictures, as diffusers' ``StableDiffusionPipelineOutput`` has them.

    ``images``: B PIL images, an array (B, H, W, 3) with values in [0, 1], or a tensor (B, 3, H, W) in [0, 1] or of
    latents (B, C, h, w), by ``output_type``. ``nsfw_content_detected``: B truth values if there is a safety checker.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None


class LatentPipeline(AdapterPipeline, FolderPipeline):
    """A text encoder, a UNet, a scheduler and an autoencoder.

    Args:
        vae: (B, 3, H, W) to latents and back; ``config.scaling_factor`` brings the latents to unit variance.
        text_encoder, tokenizer: of transformers.
        unet: the denoiser.
        scheduler: any of diffusers' with ``step``. As in diffusers' pipeline, an old config with ``steps_offset``
            other than 1 or with ``clip_sample`` is brought up to date (in a copy).
        safety_checker, feature_extractor: of Stable Diffusion 1; both or none.
        image_encoder: must be None (no IP-Adapter).
        requires_safety_checker: kept for diffusers.

    Raises:
        ValueError: components that do not fit together.
    """

    scheduler: Any

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["safety_checker"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL | VQModel | diffusers.AutoencoderKL | diffusers.VQModel,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel,
        scheduler: Any,
        safety_checker: torch.nn.Module | None = None,
        feature_extractor: Any = None,
        image_encoder: torch.nn.Module | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        if (safety_checker is None) != (feature_extractor is None) and safety_checker is not None:
            raise ValueError("a safety_checker needs its feature_extractor")
        if image_encoder is not None:
            raise ValueError("an image_encoder (IP-Adapter) is not supported")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=modern_scheduler(scheduler),
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale, self._guidance_rescale = 1.0, 0.0
        self._clip_skip: int | None = None
        self._num_timesteps, self._interrupt = 0, False

    # The state of a call, under the names that callbacks made for diffusers look for

    @property
    def guidance_scale(self) -> float:
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
        return ClassifierFreeGuidance(self._guidance_scale, self._guidance_rescale)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance.active

    # Steps that need a pipeline

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

    def check_variances(self) -> None:
        """Bring UNet and scheduler together as to learned variances, after either was replaced.

        Raises:
            ValueError: the scheduler wants variances and the UNet has none, or the UNet has other outputs.
        """
        scheduler = without_learned_variance(self.scheduler)
        if scheduler is not self.scheduler:
            self.scheduler = scheduler
        channels, gives = self.vae.config.latent_channels, self.unet.config.out_channels
        if gives not in (channels, 2 * channels):
            raise ValueError(
                f"the UNet gives {gives} channels; for latents with {channels} it must be {channels}, or "
                f"{2 * channels} with learned variances"
            )
        if gives == channels and takes_variance(scheduler):
            raise ValueError(
                f"the scheduler has variance_type='learned_range' and the UNet gives {gives} channels, without "
                f"variances; replace it by {type(scheduler).__name__}.from_config(pipeline.scheduler.config, "
                f"variance_type='fixed_small')"
            )

    def run_steps(
        self,
        denoiser: steps.GuidedDenoiser,
        latents: Tensor,
        timesteps: Tensor,
        callback: StepCallback | None = None,
        callback_tensors: Sequence[str] = ("latents",),
        **options: Any,
    ) -> Tensor:
        """The denoising loop with progress bar and callback; setting ``_interrupt`` in the callback ends it."""
        callback_tensors = getattr(callback, "tensor_inputs", callback_tensors)
        for name in callback_tensors:
            if name not in self._callback_tensor_inputs:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs: there is no {name!r}; "
                    f"choose from {', '.join(self._callback_tensor_inputs)}"
                )
        self._interrupt, self._num_timesteps = False, len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for state in steps.denoise(denoiser, self.scheduler, latents, timesteps, **options):
                latents = state.latents
                if callback is not None:
                    latents = state.latents = self._call_back(callback, callback_tensors, denoiser, state)
                bar.update()
                if self._interrupt:
                    break
        return latents

    def _call_back(
        self, callback: StepCallback, names: Sequence[str], denoiser: steps.GuidedDenoiser, state: steps.DenoisingState
    ) -> Tensor:
        """Show the callback the tensors it asked for, and take over what it changed. Returns the latents."""
        embeds = denoiser.prompt_embeds
        tensors = {
            "latents": state.latents,
            "prompt_embeds": embeds,
            "negative_prompt_embeds": embeds.chunk(2)[0] if self.guidance.active else None,
        }
        changed = callback(self, state.index, state.timestep, {name: tensors[name] for name in names}) or {}
        new_embeds = changed.get("prompt_embeds", embeds)
        if new_embeds is not embeds:
            denoiser.prompt_embeds = new_embeds
        denoiser.guidance = self.guidance
        return changed.get("latents", state.latents)

    def finish(self, latents: Tensor, output_type: str, return_dict: bool) -> ImagesOutput | tuple[Any, Any]:
        """Latents (B, C, h, w) to what the caller asked for."""
        flags = None
        if output_type == "latent":
            images = latents
        else:
            pixels = steps.decode(self.vae, latents)  # (B, 3, H, W)
            pixels, flags = self._check_safety(pixels)
            images = self.image_processor.postprocess(
                pixels, output_type=output_type, do_denormalize=[not flag for flag in flags or [False] * len(pixels)]
            )
        self.maybe_free_model_hooks()
        return ImagesOutput(images=images, nsfw_content_detected=flags) if return_dict else (images, flags)

    def _check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Blacken what the safety checker objects to, if there is one."""
        if self.safety_checker is None:
            return pixels, None
        pictures = self.image_processor.postprocess(pixels, output_type="pil")
        seen = self.feature_extractor(pictures, return_tensors="pt").pixel_values.to(pixels)
        return self.safety_checker(images=pixels, clip_input=seen)


def modern_scheduler(scheduler: Any) -> Any:
    """A scheduler as diffusers' ``StableDiffusionPipeline`` sets it right: ``steps_offset`` 1, no ``clip_sample``.

    And without learned variances where it does not know them.
    """
    scheduler = without_learned_variance(scheduler)
    config = getattr(scheduler, "config", {})
    right: dict[str, Any] = {}
    if config.get("steps_offset", 1) != 1:
        right["steps_offset"] = 1
    if config.get("clip_sample", False) is True:
        right["clip_sample"] = False
    return type(scheduler).from_config(config, **right) if right else scheduler


def without_learned_variance(scheduler: Any) -> Any:
    """The scheduler, or a copy that leaves learned variances alone if it would only cut them off.

    DPM-Solver takes ``variance_type`` over from a DDPM scheduler's config, and then keeps the first three channels of
    a prediction, however many the latents have. The steps here cut at the right place.
    """
    learned = getattr(scheduler, "config", {}).get("variance_type") in ("learned", "learned_range")
    if not learned or takes_variance(scheduler) or "variance_type" not in scheduler._get_init_keys(type(scheduler)):
        return scheduler
    if "DDPM" in type(scheduler).__name__:
        raise ValueError("a DDPM scheduler with variance_type='learned' is not supported; 'learned_range' is")
    return type(scheduler).from_config(scheduler.config, variance_type=None)
