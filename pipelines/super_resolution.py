"""Super-resolution: a small picture, given to the UNet beside the latents, drawn large."""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Generator, Tensor

from latentdiff.models import UNet2DConditionModel
from latentdiff.pipelines import steps
from latentdiff.pipelines.base import AnyAutoencoder, StepCallback
from latentdiff.pipelines.conditioned import TextPipeline, refuse
from latentdiff.pipelines.drawing import Drawing, ImagesOutput, Steps, TextExtras, whole
from latentdiff.pipelines.pictures import Pictures, check_pictures, to_pixels


class SuperResolutionPipeline(TextPipeline):
    """Draws pictures larger by the autoencoder's factor, towards a prompt (Latent Diffusion, Rombach et al. 2022, 4.4).

    The small picture goes into the UNet as three further channels. A UNet with class embeddings (Stable Diffusion's x4
    upscaler) is also told how much noise was put on it before (Cascaded Diffusion, Ho et al. 2021). With the same
    components and generator the pictures are those of diffusers' ``StableDiffusionUpscalePipeline``, as which this one
    is saved; that one sets the autoencoder's ``scaling_factor`` to 0.08333, whatever its config says.

    Args:
        low_res_scheduler: puts the noise on the small picture; usually a ``DDPMScheduler``.
        max_noise_level: the most of it, a timestep of ``low_res_scheduler``.
        watermarker: must be None.
        others: as for `conditioned.TextPipeline`.
    """

    saved_class_name = "StableDiffusionUpscalePipeline"
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
        **extras: Unpack[TextExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            image: the small picture, see `pictures.Pictures`; one for all, or one for each prompt. Its sides are cut to
                multiples of the autoencoder's factor; the result is larger by that factor.
            noise_level: how much noise is put on it, a timestep of ``low_res_scheduler``; more leaves more to invent.
                Without effect for a UNet that has no class embeddings: it gets the picture as it is.
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; the picture is none; the noise level is above ``max_noise_level``.
        """
        self.check_channels(3, "a UNet for super-resolution takes latents and a picture with three channels")
        pixels = to_pixels(self.image_processor, image)
        self._check_noise_level(noise_level)
        with self.lora_scale(cross_attention_kwargs):
            drawing = self.begin(
                prompt=prompt,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                num_images_per_prompt=num_images_per_prompt,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                clip_skip=clip_skip,
                generator=generator,
                seed=seed,
                output_type=output_type,
                return_dict=return_dict,
                extras=extras,
            )
            schedule, _ = self.plan_steps(num_inference_steps)
            condition, labels = self._small_picture(drawing, pixels, noise_level)
            shape = (drawing.count, self.vae.config.latent_channels, *pixels.shape[-2:])
            result = yield from self.run_steps(
                self.denoiser(drawing, condition=condition, class_labels=labels),
                self.first_latents(drawing, shape, latents),
                schedule,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                **steps.step_options(self.scheduler, drawing.noise.generator, eta),
            )
        return self.finish(drawing, result)

    def _check_noise_level(self, noise_level: int) -> None:
        most = self.config.max_noise_level
        if isinstance(noise_level, bool) or not isinstance(noise_level, int) or not 0 <= noise_level <= most:
            raise ValueError(f"noise_level must be a whole number in [0, {most}], not {noise_level!r}")

    def _small_picture(self, drawing: Drawing, pixels: Tensor, noise_level: int) -> tuple[Tensor, Tensor | None]:
        """The UNet's further channels (B, 3, h, w), and the noise level (B,) if it wants to know."""
        count = drawing.count
        check_pictures("image", len(pixels), count // drawing.drawn, count)
        pixels = pixels.to(self._execution_device, self.unet.dtype)
        if self.unet.config.num_class_embeds is None:
            return pixels.repeat_interleave(count // len(pixels), dim=0), None
        if isinstance(drawing.noise.generator, list):
            pixels = pixels.repeat_interleave(count // len(pixels), dim=0)
        noise = drawing.noise.draw(tuple(pixels.shape)).to(pixels)
        level = torch.tensor([noise_level], device=pixels.device)
        pixels = steps.noised(self.low_res_scheduler, pixels, noise, level)
        return pixels.repeat_interleave(count // len(pixels), dim=0), level.repeat(count)
