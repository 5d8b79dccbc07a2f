"""Inpainting by codes: those of the picture that the mask leaves alone are kept, the others are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from torch import Generator, Tensor

from latentdiff.pipelines.core.call_options import PictureExtras, PictureOptions, StepCallback
from latentdiff.pipelines.core.input_pictures import Pictures, check_pictures, to_mask, to_pixels, upright_pair
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Steps, whole
from latentdiff.pipelines.core.token_call import TokenOptions
from latentdiff.pipelines.tasks.tokens import TokenPipeline, TokenTextCall


@dataclass(frozen=True, kw_only=True)
class TokenMaskOptions(TokenOptions, PictureOptions):
    """Of a call with a picture and a mask."""

    mask_image: Pictures = None


class TokenInpaintPipeline(TokenPipeline):
    """Draws the masked part of pictures anew, towards a prompt, by keeping the codes of the rest.

    MaskGIT (Chang et al. 2022), Sec. 4.3; MUSE (Chang et al. 2023), Sec. 3.4. In the masked order what is drawn fits
    what is kept all around; in raster order only what is above and before. The components are `TokenPipeline`'s, whose
    folders it loads.
    """

    saved_class_name = "TokenInpaintPipeline"

    @cached_property
    def mask_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @whole
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Pictures = None,
        mask_image: Pictures = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: Generator | list[Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_temperature: float = 2.0,
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[PictureExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            image: what to paint in; one for all or for each prompt. It keeps its shape.
            mask_image: white where to paint. A code is drawn anew if any of its pixels is masked.
            others: as of ``TokenPipeline``.

        Raises:
            TypeError, ValueError: as there; a picture or a mask is none, or sizes do not go together.
        """
        options = TokenMaskOptions.of(locals())
        for name in options.sdxl:
            raise ValueError(f"{name} is for SDXL, and this is a {type(self).__name__}; leave it out")
        if image is None or mask_image is None:
            raise ValueError(f"{'image' if image is None else 'mask_image'} is missing; give a picture and its mask")
        image, mask_image = upright_pair(image, mask_image)
        placement = self.placement(image, options.height, options.width, options.resize_mode)
        call = TokenTextCall(self, options)
        codes = call.hidden_codes(placement.height, placement.width)
        kept = self._spread("image", call, call.codec.posterior(to_pixels(self.image_processor, image, placement)).mean)
        mask = to_mask(self.mask_processor, mask_image, placement)
        hidden = self._spread("mask_image", call, F.max_pool2d(mask, self.vae_scale_factor)) > 0
        codes = torch.where(hidden, codes, kept.to(codes))
        return (yield from call.draw(call.token_denoiser(call.conditioning), codes, call.schedule(codes)))

    def _spread(self, name: str, call: TokenTextCall, given: Tensor) -> Tensor:
        """(P, 1, h, w) -> (B, 1, h, w). Raises ValueError if they are neither one for all nor one for each prompt."""
        check_pictures(name, len(given), call.items, call.count)
        return given.repeat_interleave(call.count // len(given), dim=0).to(call.device)
