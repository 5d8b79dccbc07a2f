"""Inpainting: part of a picture drawn anew, the rest kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Generator, Tensor

from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines import steps
from latentdiff.pipelines.base import StepCallback
from latentdiff.pipelines.conditioned import TextPipeline, refuse
from latentdiff.pipelines.drawing import Drawing, ImagesOutput, Steps, TextExtras, whole
from latentdiff.pipelines.pictures import Pictures, are_latents, check_pictures, to_mask, to_pixels, upright_rgb


@dataclass
class Canvas:
    """What is painted on: H x W pixels, maybe a part of the picture that was given."""

    pixels: Tensor
    """(P, 3, H, W) in [-1, 1], or latents (P, C, h, w)."""
    mask: Tensor
    """(P', 1, H, W), 1 where to paint."""
    crop: tuple[int, int, int, int] | None
    """Left, upper, right and lower of the part, in the picture's own pixels."""


class InpaintPipeline(TextPipeline):
    """Draws the masked part of pictures anew, towards a prompt.

    A UNet made for it (Stable Diffusion's have nine input channels: latents, mask, masked picture) sees what to keep;
    with a plain one the kept part is put back, noised as it has to be, after every step (RePaint, Lugmayr et al. 2022,
    Eq. 8). With the same components and generator the pictures are those of diffusers'
    ``StableDiffusionInpaintPipeline``, as which this one is saved. The components are those of `TextToImagePipeline`.
    """

    saved_class_name = "StableDiffusionInpaintPipeline"
    _callback_tensor_inputs: ClassVar[list[str]] = [
        *TextPipeline._callback_tensor_inputs,
        "mask",
        "masked_image_latents",
    ]

    @cached_property
    def mask_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @whole
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures = None,
        mask_image: Pictures = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[TextExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            image: what to paint in, see `pictures.Pictures`; one for all, or one for each prompt. Brought to ``height``
                and ``width``. Scaled latents (P, C, h, w) are taken as they are.
            mask_image: white where to paint; a PIL image, or with one channel an array or a tensor, values in [0, 1].
            masked_image_latents: (P, C, h, w), instead of the encoded picture without what the mask covers; for a UNet
                made for inpainting.
            padding_mask_crop: paint only the mask's surroundings, with at least so many pixels around the mask, at the
                model's full size, and put the result back into the picture. For PIL images.
            strength: from 0 to 1, how much of the way from noise is drawn anew; below 1 the masked part shows through.
            callback_on_step_end_tensor_inputs: as there, and mask (B, 1, h, w) and masked_image_latents (None with a
                plain UNet).
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; a picture or a mask is none, sizes or numbers do not go together.
        """
        refuse(ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds)
        plain = self.unet.config.in_channels == self.vae.config.latent_channels
        self.check_channels(
            0 if plain else 1 + self.vae.config.latent_channels,
            "a UNet for inpainting takes latents, a mask and the latents of the masked picture",
        )
        height, width = self.picture_size(height, width)
        canvas = self._canvas(image, mask_image, height, width, padding_mask_crop, output_type)
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
            schedule, planned = self.plan_steps(num_inference_steps, timesteps, sigmas)
            schedule = steps.last_timesteps(self.scheduler, schedule, planned, strength)
            shape = self.latents_shape(drawing.count, height, width)
            start = self.start_latents(drawing, canvas.pixels) if plain or strength < 1 else None
            if start is not None:
                steps.check_latents(start, shape)
            noise = drawing.noise.first(shape) if latents is None else steps.check_latents(latents, shape)
            noise = noise.to(self._execution_device, self.unet.dtype)
            if start is None or strength == 1 or latents is not None:
                first = noise * self.scheduler.init_noise_sigma
            else:
                first = steps.noised(self.scheduler, start, noise, schedule[0])
            denoiser = PaintingDenoiser(
                self.unet,
                drawing.embeds,
                self.guidance,
                mask=self._latent_mask(drawing, canvas.mask, shape),
                masked=self._masked_latents(drawing, canvas, masked_image_latents, plain),
                **self.own_scale(drawing),
            )
            result = yield from self.run_steps(
                denoiser,
                first,
                schedule,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                Keeper(self.scheduler, start, noise, schedule, denoiser) if plain and start is not None else None,
                **steps.step_options(self.scheduler, drawing.noise.generator, eta),
            )
        output = self.finish(drawing, result)
        return output if canvas.crop is None else self._put_back(output, image, mask_image, canvas.crop)

    def _canvas(
        self, image: Pictures, mask: Pictures, height: int, width: int, padding: int | None, output_type: str
    ) -> Canvas:
        """What to paint on, at the size to paint at; a part of the picture if `padding` is given."""
        options: dict[str, Any] = {"height": height, "width": width}
        crop = None
        if padding is not None:
            if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image) or output_type != "pil":
                raise ValueError("padding_mask_crop needs a PIL image and a PIL mask, and gives PIL images")
            if image.size != mask.size:
                raise ValueError(f"the picture has {image.size} pixels and the mask {mask.size}; they must be the same")
            if mask.convert("L").getbbox() is None:
                raise ValueError("the mask has nothing white, so padding_mask_crop has nothing to surround")
            crop = self.mask_processor.get_crop_region(mask, width, height, pad=padding)
            options |= {"crops_coords": crop, "resize_mode": "fill"}
        pixels = to_pixels(self.image_processor, image, **options)
        return Canvas(pixels.float(), to_mask(self.mask_processor, mask, **options), crop)

    def _latent_mask(self, drawing: Drawing, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(P, 1, H, W) -> (B, 1, h, w), the nearest pixel's value."""
        check_pictures("mask_image", len(mask), drawing.count // drawing.drawn, drawing.count)
        small = F.interpolate(mask, size=shape[-2:]).to(self._execution_device, self.unet.dtype)
        return small.repeat_interleave(drawing.count // len(mask), dim=0)

    def _masked_latents(self, drawing: Drawing, canvas: Canvas, given: Tensor | None, plain: bool) -> Tensor | None:
        """(B, C, h, w) of the picture without what the mask covers; None if the UNet does not look at it."""
        if plain:
            if not isinstance(drawing.noise.generator, list):
                # diffusers encodes it all the same; its draw is repeated, so that a generator goes on as it does there
                drawing.noise.draw(self.latents_shape(len(canvas.pixels), *canvas.mask.shape[-2:]))
            return None
        if given is None:
            if are_latents(canvas.pixels, self.vae.config.latent_channels):
                raise ValueError("with latents for a picture, masked_image_latents must be given too")
            given = canvas.pixels * (canvas.mask < 0.5)
        return self.start_latents(drawing, given, "masked_image_latents")

    def callback_tensors(self, denoiser: Any, state: steps.DenoisingState) -> dict[str, Any]:
        tensors = super().callback_tensors(denoiser, state)
        return {**tensors, "mask": denoiser.mask, "masked_image_latents": denoiser.masked}

    def take_over(self, denoiser: Any, changed: dict[str, Any]) -> None:
        super().take_over(denoiser, changed)
        denoiser.set_mask(changed.get("mask", denoiser.mask), changed.get("masked_image_latents", denoiser.masked))

    def _put_back(self, output: Any, image: Any, mask: Any, crop: tuple[int, int, int, int]) -> Any:
        """The painted parts in their places in the picture."""
        overlay = self.image_processor.apply_overlay
        whole_ones = [overlay(mask, upright_rgb(image), part, crop) for part in output[0]]
        if isinstance(output, tuple):
            return whole_ones, *output[1:]
        output.images = whole_ones
        return output


class PaintingDenoiser(steps.GuidedDenoiser):
    """A denoiser that knows where to paint; its UNet is shown it if it takes more than latents.

    Args:
        mask: (B, 1, h, w), 1 where to paint.
        masked: (B, C, h, w), latents of the picture without that, or None with a plain UNet.
    """

    def __init__(
        self,
        unet: Any,
        prompt_embeds: Tensor,
        guidance: ClassifierFreeGuidance,
        mask: Tensor,
        masked: Tensor | None,
        timestep_cond: Tensor | None = None,
    ) -> None:
        super().__init__(unet, prompt_embeds, guidance, timestep_cond=timestep_cond)
        self.set_mask(mask, masked)

    def set_mask(self, mask: Tensor, masked: Tensor | None) -> None:
        self.mask, self.masked = mask, masked
        self.condition = None if masked is None else torch.cat([mask, masked], dim=1)


@dataclass
class Keeper:
    """Puts back what is not to be painted after every step, with the noise that the next one expects."""

    scheduler: Any
    start: Tensor
    noise: Tensor
    timesteps: Tensor
    denoiser: PaintingDenoiser

    def __call__(self, state: steps.DenoisingState) -> Tensor:
        """(B, C, h, w)"""
        kept, mask = self.start, self.denoiser.mask
        if state.index + 1 < len(self.timesteps):
            kept = steps.noised(self.scheduler, kept, self.noise, self.timesteps[state.index + 1])
        return (1 - mask) * kept + mask * state.latents
