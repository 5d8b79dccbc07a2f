"""Variations: pictures like a given one, by a UNet that a picture's embedding conditions instead of a text."""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import diffusers
import torch
from torch import Generator, Tensor, nn

from latentdiff.models import UNet2DConditionModel
from latentdiff.pipelines import steps
from latentdiff.pipelines.base import AnyAutoencoder, LatentPipeline, StepCallback, check_count, check_output_type
from latentdiff.pipelines.drawing import Drawing, Extras, ImagesOutput, Steps, refuse_unknown, whole
from latentdiff.pipelines.pictures import Pictures, upright_rgb


class ImageVariationPipeline(LatentPipeline):
    """Draws pictures that mean what a given one means, as a CLIP model sees it.

    With the same components and generator the pictures are those of diffusers'
    ``StableDiffusionImageVariationPipeline``, as which this one is saved. (Variations of a picture that a text-to-image
    model drew need no other model: draw it again with ``variation_seed`` and ``variation_strength``.)

    Args:
        image_encoder: of transformers, with projection; its ``image_embeds`` (P, D) are the UNet's one token.
        feature_extractor: brings pictures to what the encoder takes.
        others: as for `conditioned.TextPipeline`.
    """

    saved_class_name = "StableDiffusionImageVariationPipeline"
    model_cpu_offload_seq = "image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor"]

    def __init__(
        self,
        vae: AnyAutoencoder,
        image_encoder: nn.Module,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel,
        scheduler: Any,
        safety_checker: nn.Module | None = None,
        feature_extractor: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        self.register_parts(
            scheduler,
            vae=vae,
            image_encoder=image_encoder,
            unet=unet,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    @whole
    @torch.no_grad()
    def __call__(
        self,
        image: Pictures = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance_rescale: float = 0.0,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[Extras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each picture in turn, ``num_images_per_prompt``.

        Args:
            image: a PIL image or a list of them, or a tensor (P, 3, H, W) as the image encoder takes it.
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; the picture is none.
        """
        refuse_unknown(extras, Extras)
        check_output_type(output_type)
        self.check_channels(0, "a UNet for variations takes latents alone")
        height, width = self.picture_size(height, width)
        seen = self._embed(image)  # (P, 1, D)
        repeats = check_count(num_images_per_prompt)
        self.set_guidance(guidance_scale, guidance_rescale, extras.get("guidance_interval"), len(seen), repeats)
        seen = seen.repeat_interleave(repeats, dim=0)
        noise_source, seeds = self.noise_source(len(seen), seed, generator, extras)
        embeds = torch.cat([torch.zeros_like(seen), seen]) if self.guidance.active else seen
        drawing = Drawing(embeds, len(seen), noise_source, seeds, output_type, return_dict)

        schedule, _ = self.plan_steps(num_inference_steps)
        shape = self.latents_shape(drawing.count, height, width)
        result = yield from self.run_steps(
            self.denoiser(drawing),
            self.first_latents(drawing, shape, latents),
            schedule,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            **steps.step_options(self.scheduler, noise_source.generator, eta),
        )
        return self.finish(drawing, result)

    def _embed(self, image: Pictures) -> Tensor:
        """Pictures -> (P, 1, D)."""
        if image is None:
            raise ValueError("image is missing; give a picture")
        if not isinstance(image, Tensor):
            if self.feature_extractor is None:
                raise ValueError("this pipeline has no feature_extractor; give the picture as a tensor")
            image = self.feature_extractor(images=upright_rgb(image), return_tensors="pt").pixel_values
        encoder = self.image_encoder
        embeds = encoder(image.to(self._execution_device, encoder.dtype)).image_embeds
        return embeds[:, None].to(self.unet.dtype)
