"""Text to image: noise, denoised towards a prompt, decoded."""

from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Generator, Tensor

from latentdiff.pipelines.core.options import StepCallback, TextExtras, TextOptions
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Steps, whole
from latentdiff.pipelines.tasks.text import TextCall, TextPipeline


class TextToImagePipeline(TextPipeline):
    """Draws pictures from prompts: latent diffusion (Rombach et al. 2022) under classifier-free guidance.

    ``pipeline("a red car", seed=0).images[0]`` is a PIL image. With the same components, latents and scheduler the
    pictures are those of diffusers' ``StableDiffusionPipeline``, as which this one is saved.
    """

    saved_class_name = "StableDiffusionPipeline"
    call_class: ClassVar[type[TextCall]] = TextCall
    """What reads a call's options and draws; a kind that changes that has its own."""

    @whole
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[TextExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            prompt: what to draw; "" is no prompt at all. What is too long for the text encoder is cut, with a warning.
            height, width: in pixels, multiples of the autoencoder's factor; by default what the model was trained on.
            num_inference_steps: denoising steps; by default the model's (see ``defaults``).
            timesteps, sigmas: own sampling steps, with schedulers that take them.
            guidance_scale: how strongly the prompt is followed; up to 1 it is merely given. One for all, or one for
                each prompt or image. By default the model's.
            negative_prompt: what to keep away from: one for all, or one for each prompt. Needs guidance.
            num_images_per_prompt: how many pictures of each prompt.
            eta: of DDIM; 0 adds no noise, 1 as much as DDPM. Other schedulers ignore it.
            generator: one for the batch, or one for each image. Not together with ``seed``.
            latents: (B, C, h, w), standard normal, instead of drawn ones.
            prompt_embeds, negative_prompt_embeds: (prompts, L, D), text states instead of prompts.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple (images, nsfw flags).
            cross_attention_kwargs: {"scale": how strongly loaded LoRAs act} and nothing else.
            guidance_rescale: from 0 to 1, see ``ClassifierFreeGuidance``.
            clip_skip: take the text states this many layers before the last (CLIP only).
            callback_on_step_end: called as ``callback(pipeline, step, timestep, tensors)`` after each step; returns
                the tensors, changed or not.
            callback_on_step_end_tensor_inputs: which tensors it gets: latents, prompt_embeds, negative_prompt_embeds.
            seed: image i is drawn with the seed ``seed + i`` (or with the i-th of B seeds), by a generator of its own
                on the CPU. So it is the picture that this seed alone gives, whatever the batch and the device.
            extras: ``guidance_interval``, ``variation_seed`` and ``variation_strength``, ``prompt_weights``,
                ``long_prompts``, ``candidates`` and ``reranker``: see ``TextExtras``.
            ip_adapter_image, ip_adapter_image_embeds: not supported.

        Raises:
            TypeError: a prompt or a seed is of a wrong type.
            ValueError: a value does not fit, or something is not supported; the message says which and why.
        """
        options = TextOptions.of(locals())
        self.check_channels(0, "a UNet for inpainting needs a picture and a mask, and cannot draw from text alone")
        size = self.picture_size(height, width)
        call = self.call_class(self, options)
        schedule = call.timesteps()
        latents = call.first_latents(call.latents_shape(*size))
        return (yield from call.draw(call.denoiser(), latents, schedule))
