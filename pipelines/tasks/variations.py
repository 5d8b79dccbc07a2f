"""Variations: pictures like a given one, by a UNet that a picture's embedding conditions instead of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

import diffusers
import torch
from torch import Generator, Tensor, nn

from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.interchange.picture_files import to_pictures
from latentdiff.models import UNet2DConditionModel
from latentdiff.pipelines.core.call import Call
from latentdiff.pipelines.core.call_options import Extras, GuidedOptions, StepCallback, positive_whole
from latentdiff.pipelines.core.input_pictures import Pictures, are_images, picture_values, signed, upright_rgb
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pipeline import AnyAutoencoder, LatentPipeline
from latentdiff.pipelines.core.sampling import Steps, whole


@dataclass(frozen=True, kw_only=True)
class VariationOptions(GuidedOptions):
    """Of a call with pictures to vary."""

    image: Pictures = None
    num_images_per_prompt: Annotated[int | None, positive_whole] = 1


class ImageVariationPipeline(LatentPipeline):
    """Draws pictures that mean what a given one means, as a CLIP model sees it.

    With the same components and generator the pictures are those of diffusers'
    ``StableDiffusionImageVariationPipeline``, as which this one is saved. (Variations of a picture that a text-to-image
    model drew need no other model: draw it again with ``variation_seed`` and ``variation_strength``.)

    Args:
        image_encoder: of transformers, with projection; its ``image_embeds`` (P, D) are the UNet's one token.
        feature_extractor: brings pictures to what the encoder takes.
        others: as for `text_to_image.TextPipeline`.
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
            image: a PIL image or a list of them, or a tensor (P, 3, H, W) as the image encoder takes it. The
                feature_extractor brings it to the encoder's size, of which it says how (CLIP's cuts it centrally).
            height, width: by default what the model was trained on, whatever the picture's shape.
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; the picture is none.
        """
        options = VariationOptions.of(locals())
        self.check_channels(0, "a UNet for variations takes latents alone")
        size = self.picture_size(options.height, options.width)
        seen = self._embed(image)  # (P, 1, D)
        call = Call(self, options, len(seen), options.num_images_per_prompt or 1)
        nothing = Conditioning(states=torch.zeros_like(seen)) if call.guidance.active else None
        conditioning = GuidedConditioning(Conditioning(states=seen), nothing).repeat(call.per_item)
        schedule = call.timesteps()
        latents = call.first_latents(call.latents_shape(*size))
        return (yield from call.draw(call.denoiser(conditioning), latents, schedule))

    def _embed(self, image: Pictures) -> Tensor:
        """Pictures -> (P, 1, D)."""
        if image is None:
            raise ValueError("image is missing; give a picture")
        if not isinstance(image, Tensor):
            if self.feature_extractor is None:
                raise ValueError("this pipeline has no feature_extractor; give the picture as a tensor")
            pictures = upright_rgb(image) if are_images(image) else to_pictures(signed(picture_values(image)))
            image = self.feature_extractor(images=pictures, return_tensors="pt").pixel_values
        encoder = self.image_encoder
        embeds = encoder(image.to(self._execution_device, encoder.dtype)).image_embeds
        return embeds[:, None].to(self.unet.dtype)
