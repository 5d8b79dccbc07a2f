"""Inpainting: part of a picture is drawn anew, the rest stays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Unpack

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Generator, Tensor

from latentdiff.conditioning import GuidedConditioning
from latentdiff.pipelines.core.call import check_latents
from latentdiff.pipelines.core.call_options import (
    PictureExtras,
    StartOptions,
    StepCallback,
    finite_tensor,
    real_number,
    whole_from_zero,
)
from latentdiff.pipelines.core.denoiser import GuidedDenoiser
from latentdiff.pipelines.core.input_pictures import (
    Pictures,
    are_latents,
    check_pictures,
    to_mask,
    to_pixels,
    upright_pair,
)
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Progress, Steps, whole
from latentdiff.pipelines.tasks.text_to_image import TextCall, TextPipeline


@dataclass(frozen=True, kw_only=True)
class MaskOptions(StartOptions):
    """Of a call with a picture and a mask."""

    mask_image: Pictures = None
    masked_image_latents: Annotated[Tensor | None, finite_tensor] = None
    padding_mask_crop: Annotated[int | None, whole_from_zero] = None
    strength: Annotated[float, real_number] = 1.0


@dataclass
class Canvas:
    """What is painted on: H x W pixels, maybe a part of the picture that was given."""

    image: Pictures
    """As given, but upright."""
    mask_image: Pictures
    pixels: Tensor
    """(P, 3, H, W) in [-1, 1], or latents (P, C, h, w)."""
    mask: Tensor
    """(P', 1, H, W), 1 where to paint."""
    crop: tuple[int, int, int, int] | None
    """Left, upper, right and lower of the part, in the picture's own pixels."""


class PaintingCall(TextCall):
    """A call that paints within a mask.

    Attributes:
        start: (B, C, h, w), latents of the picture; None if nothing of it is needed.
        mask: (B, 1, h, w), 1 where to paint.
        masked: (B, C, h, w), latents of the picture without that, or None with a plain UNet.
    """

    options: MaskOptions
    start: Tensor | None
    mask: Tensor
    masked: Tensor | None

    def first_painting(self, canvas: Canvas, shape: tuple[int, ...], schedule: Tensor, plain: bool) -> Tensor:
        """Where sampling starts, (B, C, h, w): noise, or below strength 1 the picture with noise.

        Args:
            shape: of the result.
            plain: whether the UNet takes latents alone.
        """
        strength = self.options.strength
        self.schedule = schedule
        self.start = self.start_latents(canvas.pixels) if plain or strength < 1 else None
        if self.start is not None:
            check_latents(self.start, shape)
        self.own_noise = self.first_noise(shape).to(self.device, self.pipeline.unet.dtype)
        self.mask = self.latent_mask(canvas.mask, shape)
        self.masked = self.masked_latents(canvas, shape, plain)
        if self.start is None or strength == 1 or self.options.latents is not None:
            return self.sampler.from_noise(self.own_noise)
        return self.sampler.noised(self.start, self.own_noise, schedule[0])

    def keep(self, progress: Progress) -> Tensor:
        """What is not to be painted is put back, with the noise that the next step expects; (B, C, h, w)."""
        unpainted = self.start
        assert unpainted is not None
        if progress.step + 1 < len(self.schedule):
            unpainted = self.sampler.noised(unpainted, self.own_noise, self.schedule[progress.step + 1])
        return (1 - self.mask) * unpainted + self.mask * progress.latents

    def latent_mask(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(P, 1, H, W) -> (B, 1, h, w), the nearest pixel's value."""
        check_pictures("mask_image", len(mask), self.items, self.count)
        small = F.interpolate(mask, size=shape[-2:]).to(self.device, self.pipeline.unet.dtype)
        return small.repeat_interleave(self.count // len(mask), dim=0)

    def masked_latents(self, canvas: Canvas, shape: tuple[int, ...], plain: bool) -> Tensor | None:
        """(B, C, h, w) of the picture without what the mask covers; None if the UNet does not take it."""
        if plain:
            if not isinstance(self.generator, list):
                # diffusers encodes it all the same; its draw is repeated, so that a generator goes on as it does there
                self.noise((len(canvas.pixels), *shape[1:]))
            return None
        given = self.options.masked_image_latents
        if given is not None:
            check_latents(given, (len(given), *shape[1:]), "masked_image_latents")
            check_pictures("masked_image_latents", len(given), self.items, self.count)
            return given.repeat_interleave(self.count // len(given), dim=0).to(self.device, self.pipeline.unet.dtype)
        if are_latents(canvas.pixels, self.codec.channels):
            raise ValueError("with latents for a picture, masked_image_latents must be given too")
        return self.start_latents(canvas.pixels * (canvas.mask < 0.5))

    def painted_conditioning(self, of: GuidedConditioning | None = None) -> GuidedConditioning:
        """With mask and masked latents, if the UNet takes more than latents."""
        conditioning = of or self.conditioning
        if self.masked is None:
            return conditioning
        return conditioning.replace(channels=torch.cat([self.mask, self.masked], dim=1))

    def callback_tensors(self, denoiser: GuidedDenoiser, progress: Progress) -> dict[str, Any]:
        tensors = super().callback_tensors(denoiser, progress)
        return {**tensors, "mask": self.mask, "masked_image_latents": self.masked}

    def take_over(self, denoiser: GuidedDenoiser, changed: dict[str, Any]) -> None:
        super().take_over(denoiser, changed)
        before = (self.mask, self.masked)
        self.mask, self.masked = changed.get("mask", self.mask), changed.get("masked_image_latents", self.masked)
        if self.masked is not None and (self.mask is not before[0] or self.masked is not before[1]):
            denoiser.conditioning = self.painted_conditioning(denoiser.conditioning)


class InpaintPipeline(TextPipeline):
    """Draws the masked part of pictures anew, towards a prompt.

    A UNet made for it (Stable Diffusion's have nine input channels: latents, mask, masked picture) sees what to keep;
    with a plain one the kept part is put back, noised as it has to be, after every step (RePaint, Lugmayr et al. 2022,
    Eq. 8). With the same components and generator the pictures are those of diffusers'
    ``StableDiffusionInpaintPipeline``, as which this one is saved. The components are those of `TextToImagePipeline`.
    """

    saved_class_name = "StableDiffusionInpaintPipeline"
    call_class: ClassVar[type[PaintingCall]] = PaintingCall
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
        **extras: Unpack[PictureExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            image: what to paint in, see `input_pictures.Pictures`; one for all or for each prompt. It keeps its
                shape. Scaled latents (P, C, h, w) are taken as they are.
            mask_image: white where to paint; a PIL image, or with one channel an array or a tensor: truth values, 0 to
                1, or whole numbers 0 to 255. A mask without EXIF is turned as its picture's EXIF says, if its shape is
                that of the picture as stored, or does not tell; see `input_pictures.upright_pair`. It lies on the whole
                picture, whatever its own size, and is cut with it.
            height, width, resize_mode: as for `ImageToImagePipeline`; with ``resize_mode="default"``, or with
                ``padding_mask_crop``, height and width are by default what the model was trained on.
            masked_image_latents: (P, C, h, w), instead of the encoded picture without what the mask covers; for a UNet
                made for inpainting.
            padding_mask_crop: paint only the mask's surroundings, with at least this many pixels around the mask, at
                the model's full size, and put the result back into the picture. For PIL images.
            strength: from 0 to 1, how much of the way from noise is drawn anew; below 1 the masked part shows through.
            callback_on_step_end_tensor_inputs: as there, and mask (B, 1, h, w) and masked_image_latents (None with a
                plain UNet).
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; a picture or a mask is none, sizes or numbers do not go together.
        """
        options = MaskOptions.of(locals())
        plain = self.unet.config.in_channels == self.vae.config.latent_channels
        self.check_channels(
            0 if plain else 1 + self.vae.config.latent_channels,
            "a UNet for inpainting takes latents, a mask and the latents of the masked picture",
        )
        canvas = self._canvas(options)
        call = self.call_class(self, options)
        schedule = call.timesteps(options.strength)
        first = call.first_painting(canvas, call.latents_shape(*canvas.mask.shape[-2:]), schedule, plain)
        keep = None if call.start is None or not plain else call.keep
        denoiser = call.denoiser(call.painted_conditioning(), latents=first)
        output = yield from call.draw(denoiser, first, schedule, keep)
        return output if canvas.crop is None else self._put_back(output, canvas)

    def _canvas(self, options: MaskOptions) -> Canvas:
        """What to paint on, at the size to paint at; a part of the picture with ``padding_mask_crop``."""
        image, mask, padding, mode = options.image, options.mask_image, options.padding_mask_crop, options.resize_mode
        height, width = options.height, options.width
        if image is not None and mask is not None:
            image, mask = upright_pair(image, mask)
        if padding is not None or mode == "default":
            height, width = self.picture_size(height, width)
        placement = self.placement(image, height, width, mode)
        if padding is not None:
            if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image) or options.output_type != "pil":
                raise ValueError("padding_mask_crop needs a PIL image and a PIL mask, and gives PIL images")
            if image.size != mask.size:
                raise ValueError(f"the picture has {image.size} pixels and the mask {mask.size}; they must be the same")
            if mask.convert("L").getbbox() is None:
                raise ValueError("the mask has nothing white, so padding_mask_crop has nothing to surround")
            crop = self.mask_processor.get_crop_region(mask, width, height, pad=padding)
            placement = replace(placement, mode="fill", crop=crop)
        pixels = to_pixels(self.image_processor, image, placement)
        return Canvas(image, mask, pixels.float(), to_mask(self.mask_processor, mask, placement), placement.crop)

    def _put_back(self, output: Any, canvas: Canvas) -> Any:
        """The painted parts in their places in the picture."""
        overlay = self.image_processor.apply_overlay
        whole_ones = [overlay(canvas.mask_image, canvas.image, part, canvas.crop) for part in output[0]]
        if isinstance(output, tuple):
            return whole_ones, *output[1:]
        output.images = whole_ones
        return output
