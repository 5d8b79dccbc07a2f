"""Image to image: a picture, noised in part, denoised towards a prompt."""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Generator, Tensor

from latentdiff.pipelines.core.call_options import PictureExtras, StartOptions, StepCallback
from latentdiff.pipelines.core.input_pictures import Pictures, to_pixels
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Steps, whole
from latentdiff.pipelines.tasks.text_to_image import TextCall, TextPipeline


class ImageToImagePipeline(TextPipeline):
    """Redraws pictures towards a prompt: SDEdit (Meng et al. 2022) in latents.

    ``pipeline("a red car", image=sketch, strength=0.7, seed=0)``. With the same components and generator the pictures
    are those of diffusers' ``StableDiffusionImg2ImgPipeline``, as which this one is saved. The components are those of
    `TextToImagePipeline`; ``ImageToImagePipeline.from_pipe(pipeline)`` shares them.
    """

    saved_class_name = "StableDiffusionImg2ImgPipeline"
    call_class: ClassVar[type[TextCall]] = TextCall

    @whole
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
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
        height: int | None = None,
        width: int | None = None,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[PictureExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            image: what to start from, see `input_pictures.Pictures`; one for all or for each prompt; its shape stays.
                Scaled latents (P, C, h, w) are taken as they are.
            height, width: in pixels, multiples of the autoencoder's factor. Without them the picture keeps its size, or
                is brought to the area that the model was trained on, if a side or the area is more than 1.5 times that
                or less than 1 / 1.5; if one is given, the other follows. Tensors keep their size. See
                `input_pictures.place`.
            resize_mode: what is done where the shapes differ: "crop" cuts the picture at its edges, by a few pixels
                where only multiples ask for it; "default" stretches it, and brings it near no size, as in diffusers;
                "fill" keeps it whole (PIL images only).
            strength: from 0 to 1, how much of the way from noise is drawn anew: this share of the steps is run; 1
                leaves next to nothing of the picture.
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; the picture is none, or the numbers of pictures and prompts differ.
        """
        options = StartOptions.of(locals())
        self.check_channels(0, "for a UNet that takes a mask there is InpaintPipeline")
        placement = self.placement(image, options.height, options.width, options.resize_mode)
        pixels = to_pixels(self.image_processor, image, placement)
        call = self.call_class(self, options)
        schedule = call.timesteps(options.strength)
        start = call.start_latents(pixels)
        latents = call.noised_start(start, schedule[0])
        return (yield from call.draw(call.denoiser(latents=latents), latents, schedule))
