"""Image to image: a picture, noised in part, denoised towards a prompt."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Generator, Tensor

from latentdiff.pipelines import steps
from latentdiff.pipelines.base import StepCallback
from latentdiff.pipelines.conditioned import TextPipeline, refuse
from latentdiff.pipelines.drawing import ImagesOutput, Steps, TextExtras, whole
from latentdiff.pipelines.pictures import Pictures, to_pixels


class ImageToImagePipeline(TextPipeline):
    """Redraws pictures towards a prompt: SDEdit (Meng et al. 2022) in latents.

    ``pipeline("a red car", image=sketch, strength=0.7, seed=0)``. With the same components and generator the pictures
    are those of diffusers' ``StableDiffusionImg2ImgPipeline``, as which this one is saved. The components are those of
    `TextToImagePipeline`; ``ImageToImagePipeline.from_pipe(pipeline)`` shares them.
    """

    saved_class_name = "StableDiffusionImg2ImgPipeline"

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
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[TextExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            image: what to start from, see `pictures.Pictures`; one for all, or one for each prompt. It keeps its size,
                cut to multiples of the autoencoder's factor. Scaled latents (P, C, h, w) are taken as they are.
            strength: from 0 to 1, how much of the way from noise is drawn anew: this share of the steps is run; 1
                leaves next to nothing of the picture.
            others: as for `TextToImagePipeline`.

        Raises:
            TypeError, ValueError: as there; the picture is none, or the numbers of pictures and prompts differ.
        """
        refuse(ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds)
        self.check_channels(0, "for a UNet that takes a mask there is InpaintPipeline")
        pixels = to_pixels(self.image_processor, image)
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
            start = self.start_latents(drawing, pixels)
            noise = drawing.noise.first(tuple(start.shape)).to(start)
            result = yield from self.run_steps(
                self.denoiser(drawing),
                steps.noised(self.scheduler, start, noise, schedule[0]),
                schedule,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                **steps.step_options(self.scheduler, drawing.noise.generator, eta),
            )
        return self.finish(drawing, result)
