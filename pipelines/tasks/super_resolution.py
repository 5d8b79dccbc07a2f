"""Super-resolution: a small picture, given to the UNet beside the latents, drawn large."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Generator, Tensor

from latentdiff.models import UNet2DConditionModel
from latentdiff.pipelines.core.call_options import (
    PictureExtras,
    PictureOptions,
    StepCallback,
    refuse,
    whole_number,
)
from latentdiff.pipelines.core.input_pictures import Pictures, check_pictures, to_pixels
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pipeline import AnyAutoencoder
from latentdiff.pipelines.core.sampling import Sampler, Steps, whole
from latentdiff.pipelines.tasks.text_to_image import TextCall, TextPipeline


@dataclass(frozen=True, kw_only=True)
class SmallPictureOptions(PictureOptions):
    """Of a call with a small picture to draw large."""

    noise_level: Annotated[int, whole_number] = 20


class SuperResolutionPipeline(TextPipeline):
    """Draws pictures larger by the autoencoder's factor, towards a prompt (Latent Diffusion, Rombach et al. 2022, 4.4).

    The small picture goes into the UNet as three further channels. A UNet with class embeddings (Stable Diffusion's x4
    upscaler) also gets the level of the noise that is added to it first (Cascaded Diffusion, Ho et al. 2021). With the
    same components and generator the pictures are those of diffusers' ``StableDiffusionUpscalePipeline``, as which this
    one is saved; that one sets the autoencoder's ``scaling_factor`` to 0.08333, whatever its config says.

    Args:
        low_res_scheduler: puts the noise on the small picture; usually a ``DDPMScheduler``.
        max_noise_level: the most of it, a timestep of ``low_res_scheduler``.
        watermarker: must be None.
        others: as for `text_to_image.TextPipeline`.
    """

    saved_class_name = "StableDiffusionUpscalePipeline"
    draws_any_size = True  # the small picture decides what is where
    usual_defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 75, "guidance_scale": 9.0}
    _optional_components: ClassVar[list[str]] = ["watermarker", "safety_checker", "feature_extractor"]

    def __init__(
        self,
        vae: AnyAutoencoder,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel,
        low_res_scheduler: Any,
        scheduler: Any,
        safety_checker: torch.nn.Module | None = None,
        feature_extractor: Any = None,
        watermarker: Any = None,
        max_noise_level: int = 350,
    ) -> None:
        super(TextPipeline, self).__init__()
        refuse(watermarker=watermarker)
        self.register_parts(
            scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            low_res_scheduler=low_res_scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )
        self.register_to_config(max_noise_level=max_noise_level)
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, resample="bicubic", vae_latent_channels=3
        )

    @whole
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        noise_level: int = 20,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        *,
        guidance_rescale: float = 0.0,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[PictureExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            image: the small picture, see `input_pictures.Pictures`; one for all or for each prompt. It keeps its size,
                cut at its edges to multiples of the autoencoder's factor (with ``resize_mode="default"`` stretched to
                them, as in diffusers); the result is larger by that factor.
            noise_level: how much noise is put on it, a timestep of ``low_res_scheduler``; more leaves more to invent.
                Without effect for a UNet that has no class embeddings: it gets the picture as it is.
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; the picture is none; the noise level is above ``max_noise_level``, or what
                the UNet has embeddings for.
        """
        options = SmallPictureOptions.of(locals())
        self.check_channels(3, "a UNet for super-resolution takes latents and a picture with three channels")
        pixels = to_pixels(self.image_processor, image, self.placement(image, mode=options.resize_mode))
        most, why = self._most_noise()
        if not 0 <= options.noise_level <= most:
            raise ValueError(f"noise_level must be a whole number in [0, {most}], not {noise_level!r} ({why})")
        call = TextCall(self, options)
        schedule = call.timesteps()
        channels, labels = self._small_picture(call, pixels, options.noise_level)
        latents = call.first_latents((call.count, call.codec.channels, *pixels.shape[-2:]))
        denoiser = call.denoiser(call.conditioning.replace(channels=channels, labels=labels))
        return (yield from call.draw(denoiser, latents, schedule))

    def _most_noise(self) -> tuple[int, str]:
        """The largest noise level that a call takes, and what limits it."""
        unet, limits = self.unet.config, [(self.config.max_noise_level, "the model's max_noise_level")]
        if unet.num_class_embeds is not None:
            steps = self.low_res_scheduler.config.num_train_timesteps
            limits.append((steps - 1, f"its low_res_scheduler has {steps} timesteps"))
            if unet.get("class_embed_type") is None:
                limits.append((unet.num_class_embeds - 1, f"its UNet has {unet.num_class_embeds} class embeddings"))
        return min(limits)

    def _small_picture(self, call: TextCall, pixels: Tensor, noise_level: int) -> tuple[Tensor, Tensor | None]:
        """The UNet's further channels (B, 3, h, w), and the noise level (B,) if it has class embeddings."""
        count = call.count
        check_pictures("image", len(pixels), call.items, count)
        pixels = pixels.to(call.device, self.unet.dtype)
        if self.unet.config.num_class_embeds is None:
            return pixels.repeat_interleave(count // len(pixels), dim=0), None
        if isinstance(call.generator, list):
            pixels = pixels.repeat_interleave(count // len(pixels), dim=0)
        noise = call.noise(tuple(pixels.shape)).to(pixels)
        level = torch.tensor([noise_level], device=pixels.device)
        pixels = Sampler(self.low_res_scheduler).noised(pixels, noise, level)
        return pixels.repeat_interleave(count // len(pixels), dim=0), level.repeat(count)
