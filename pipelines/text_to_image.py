"""Text to image: noise, denoised towards a prompt, decoded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from latentdiff.pipelines import steps
from latentdiff.pipelines.base import ImagesOutput, LatentPipeline, StepCallback
from latentdiff.pipelines.prompts import PromptEncoder

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class TextToImagePipeline(LatentPipeline):
    """Draws pictures from prompts: latent diffusion (Rombach et al. 2022) under classifier-free guidance.

    ``pipeline("a red car", seed=0).images[0]`` is a PIL image. With the same components, latents and scheduler the
    pictures are those of diffusers' ``StableDiffusionPipeline``, as which this one is saved.
    """

    saved_class_name = "StableDiffusionPipeline"

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
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
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
    ) -> ImagesOutput | tuple[Any, Any]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            prompt: what to draw; "" is no prompt at all. What is too long for the text encoder is cut, with a warning.
            height, width: in pixels, multiples of the autoencoder's factor; by default what the model was trained on.
            num_inference_steps: denoising steps; by default the model's (see ``defaults``).
            timesteps, sigmas: own sampling steps, with schedulers that take them.
            guidance_scale: how strongly the prompt is followed; up to 1 it is merely given. By default the model's.
            negative_prompt: what to keep away from: one for all, or one for each prompt. Needs guidance.
            num_images_per_prompt: how many pictures of each prompt.
            eta: of DDIM; 0 adds no noise, 1 as much as DDPM. Other schedulers ignore it.
            generator: one for the batch, or one for each image. Not together with ``seed``.
            latents: (B, C, h, w), standard normal, instead of drawn ones.
            prompt_embeds, negative_prompt_embeds: (prompts, L, D), text states instead of prompts.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple (images, nsfw flags).
            guidance_rescale: from 0 to 1, see ``ClassifierFreeGuidance``.
            clip_skip: take the text states this many layers before the last (CLIP only).
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after each step; returns
                the tensors, changed or not.
            callback_on_step_end_tensor_inputs: which tensors it gets: latents, prompt_embeds, negative_prompt_embeds.
            seed: image i is drawn with the seed ``seed + i`` (or with the i-th of B seeds), by a generator of its own
                on the CPU. So it is the picture that this seed alone gives, whatever the batch and the device.
            ip_adapter_image, ip_adapter_image_embeds, cross_attention_kwargs: not supported.

        Raises:
            TypeError: a prompt or a seed is of a wrong type.
            ValueError: a value does not fit, or something is not supported; the message says which and why.
        """
        refuse(
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            cross_attention_kwargs=cross_attention_kwargs or None,
        )
        self._check_call(output_type)
        self._guidance_scale = self.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        self._guidance_rescale, self._clip_skip = guidance_rescale, clip_skip
        height, width = self.picture_size(height, width)
        device, dtype = self._execution_device, self.unet.dtype

        encoder = PromptEncoder(
            self.tokenizer, self.text_encoder, device, dtype, check_count(num_images_per_prompt), clip_skip
        )
        positive, negative = encoder.encode(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, self.guidance.active
        )  # (B, L, D) each
        count = len(positive)
        embeds = positive if negative is None else torch.cat([negative, positive])  # (B or 2B, L, D)

        if num_inference_steps is None:
            num_inference_steps = self.defaults["num_inference_steps"]
        schedule = steps.set_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)  # (S,)
        generator = steps.image_generators(seed, generator, count)
        grid = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        latents = steps.first_latents(
            (count, self.unet.config.in_channels, *grid),
            self.scheduler,
            generator,
            device,
            noise_dtype=dtype if seed is None else torch.float32,  # so that a seed means the same in all precisions
            latents=latents,
        ).to(dtype)  # (B, C, h, w)

        latents = self.run_steps(
            steps.GuidedDenoiser(self.unet, embeds, self.guidance),
            latents,
            schedule,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            **steps.step_options(self.scheduler, generator, eta),
        )
        return self.finish(latents, output_type, return_dict)

    def _check_call(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; choose from {', '.join(OUTPUT_TYPES)}")
        takes, gives = self.unet.config.in_channels, self.vae.config.latent_channels
        if takes != gives:
            raise ValueError(
                f"the UNet takes {takes} channels and the autoencoder's latents have {gives}; a UNet for inpainting "
                f"needs a picture and a mask, and cannot draw from text alone"
            )
        self.check_variances()


def refuse(**arguments: Any) -> None:
    """Raises ValueError for arguments of diffusers' call that are given and not supported."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported")


def check_count(num_images_per_prompt: int | None) -> int:
    count = 1 if num_images_per_prompt is None else num_images_per_prompt
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_images_per_prompt must be a whole number from 1, not {num_images_per_prompt!r}")
    return count
