"""Text to image: noise, denoised towards a prompt, decoded; and what all pipelines with a text encoder share."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Unpack

import diffusers
import torch
from torch import Generator, Tensor

from latentdiff.conditioning import GuidedConditioning
from latentdiff.models import UNet2DConditionModel
from latentdiff.pipelines.core.call import Call
from latentdiff.pipelines.core.call_options import StepCallback, TextExtras, TextOptions, positive_whole, refuse
from latentdiff.pipelines.core.denoiser import GuidedDenoiser, loras_at
from latentdiff.pipelines.core.input_pictures import are_latents, check_pictures
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pipeline import AnyAutoencoder, LatentPipeline
from latentdiff.pipelines.core.sampling import Steps, whole
from latentdiff.pipelines.core.scheduler_names import modern_scheduler
from latentdiff.pipelines.storage.loras import LoraPipeline
from latentdiff.pipelines.storage.single_file_pipelines import SingleFilePipeline
from latentdiff.pipelines.storage.textual_inversion import TextualInversionPipeline
from latentdiff.text.encode import Prompts, TextConditioner
from latentdiff.text.masked import counting


class TextPipeline(SingleFilePipeline, LoraPipeline, TextualInversionPipeline, LatentPipeline):
    """What the pipelines with a text encoder share: their components, and how they read prompts.

    Args:
        vae: (B, 3, H, W) to latents and back; ``config.scaling_factor`` brings the latents to unit variance.
        text_encoder, tokenizer: of transformers.
        unet: the denoiser.
        scheduler: any of diffusers' with ``step``. As in diffusers' pipeline, an old config with ``steps_offset``
            other than 1 or with ``clip_sample`` is brought up to date (in a copy).
        safety_checker, feature_extractor: of Stable Diffusion 1; both or none. What it withholds is black, the output
            and the log say which.
        image_encoder: must be None (no IP-Adapter).
        requires_safety_checker: has no effect; diffusers' configs have it.

    Raises:
        ValueError: components that do not fit together.
    """

    text_encoder: Any
    tokenizer: Any

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]

    for_sdxl: ClassVar[bool] = False
    for_pixart: ClassVar[bool] = False
    """Whether a call takes what only SDXL takes, or only PixArt."""

    call_class: ClassVar[type["TextCall"]]
    """What reads a call's options and draws; a kind that changes that has its own."""

    diffusers_options: ClassVar[Mapping[str, Any]] = {}
    """What diffusers' pipeline must be told in a call to draw as this one does by itself."""

    reranker: Any = None
    """What ``candidates`` are compared with: a ``ClipScore``, or where to load one from."""

    def __init__(
        self,
        vae: AnyAutoencoder,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel,
        scheduler: Any,
        safety_checker: torch.nn.Module | None = None,
        feature_extractor: Any = None,
        image_encoder: torch.nn.Module | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        refuse(image_encoder=image_encoder)
        self.register_parts(
            modern_scheduler(scheduler),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        *,
        prompt_weights: bool = False,
        long_prompts: Literal["cut", "chunk"] = "cut",
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Text states of prompts and negative prompts, (B, L, D) each, as a call makes them and takes them.

        The arguments are those of diffusers' method of this name, and those of a call.

        Raises:
            TypeError, ValueError: see `Prompts`.
        """
        prompts = Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        device = device or self._execution_device
        conditioner = self.conditioner(device, clip_skip, prompt_weights, long_prompts)
        if max_sequence_length is not None:
            conditioner = conditioner.limited(max_sequence_length)
        conditioning = self.condition(prompts, conditioner, do_classifier_free_guidance, lora_scale)
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
        images = positive_whole(num_images_per_prompt, "num_images_per_prompt")
        conditioning = conditioning.to(device, dtype).repeat(images)
        negative = conditioning.negative
        assert conditioning.positive.states is not None
        return conditioning.positive.states, None if negative is None else negative.states

    def conditioner(
        self,
        device: torch.device,
        clip_skip: int | None = None,
        prompt_weights: bool = False,
        long_prompts: Literal["cut", "chunk"] = "cut",
    ) -> TextConditioner:
        """What makes conditions of prompts; a kind of pipeline with more than one text encoder has its own."""
        return TextConditioner(
            self.tokenizer,
            self.text_encoder,
            device,
            clip_skip=clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
        )

    def condition(
        self, prompts: Prompts, conditioner: TextConditioner, guided: bool, lora_scale: float | None = None
    ) -> GuidedConditioning:
        """The conditions of P images, one of each prompt."""
        with loras_at(lora_scale, self.text_encoder):
            return prompts.encode(conditioner, guided)

    def with_sizes(
        self, conditioning: GuidedConditioning, options: TextOptions, height: int, width: int
    ) -> GuidedConditioning:
        """With the sizes of pictures of this height and width, for a kind whose UNet takes them."""
        return conditioning


class TextCall(Call):
    """A call with prompts: B images, for each prompt in turn ``num_images_per_prompt``, or as many candidates.

    Attributes:
        conditioning: of the B images.

    Raises:
        TypeError, ValueError: an option does not fit; the message says which and why.
    """

    pipeline: TextPipeline
    options: TextOptions
    reranker: Any = None

    def __init__(self, pipeline: TextPipeline, options: TextOptions) -> None:
        own = {"SDXL": (pipeline.for_sdxl, options.sdxl), "PixArt": (pipeline.for_pixart, options.pixart)}
        for family, (is_of_it, given) in own.items():
            for name in () if is_of_it else given:
                raise ValueError(f"{name} is for {family}, and this is a {type(pipeline).__name__}; leave it out")
        if options.candidates is not None or options.reranker is not None:
            from latentdiff.pipelines.core.candidates import reranker_of_call

            self.reranker = reranker_of_call(options, pipeline)
        self.lora_scale = options.lora_scale
        self.kept = options.num_images_per_prompt or 1
        prompts = Prompts(
            options.prompt,
            options.negative_prompt,
            counting(options.prompt_embeds, options.prompt_attention_mask, "prompt"),
            counting(options.negative_prompt_embeds, options.negative_prompt_attention_mask, "negative_prompt"),
            options.pooled_prompt_embeds,
            options.negative_pooled_prompt_embeds,
            options.prompt_2,
            options.negative_prompt_2,
        )
        super().__init__(pipeline, options, len(prompts), options.candidates or self.kept)
        self.view._clip_skip = options.clip_skip
        self.texts = prompts.texts or []
        conditioner = pipeline.conditioner(self.device, options.clip_skip, options.prompt_weights, options.long_prompts)
        if options.max_sequence_length is not None:
            conditioner = conditioner.limited(options.max_sequence_length)
        conditioning = pipeline.condition(prompts, conditioner, self.guidance.active, self.lora_scale)
        self.conditioning = conditioning.to(self.device, pipeline.unet.dtype).repeat(self.per_item)

    def denoiser(
        self, conditioning: GuidedConditioning | None = None, latents: Tensor | None = None, **options: Any
    ) -> GuidedDenoiser:
        """The UNet with this call's prompts and guidance; `conditioning`: with more than that.

        latents: (B, C, h, w), of the size of the pictures, for a kind that tells its UNet that.
        """
        conditioning = conditioning or self.conditioning
        if latents is not None:
            height, width = (side * self.codec.factor for side in latents.shape[-2:])
            conditioning = self.pipeline.with_sizes(conditioning, self.options, height, width)
        return super().denoiser(conditioning, lora_scale=self.lora_scale, **options)

    def start_latents(self, pixels: Tensor) -> Tensor:
        """Given pictures (P, 3, H, W), or latents, as the scaled latents (B, C, h, w) of the images.

        Raises:
            ValueError: neither one, nor one for each prompt.
        """
        check_pictures("image", len(pixels), self.items, self.count)
        if are_latents(pixels, self.codec.channels):
            latents = pixels.repeat_interleave(self.count // len(pixels), dim=0)
        else:
            latents = self.codec.encode(pixels, self.generator, self.count, self.noise_dtype)
        return latents.to(self.device, self.pipeline.unet.dtype)

    def noised_start(self, start: Tensor, timestep: Tensor) -> Tensor:
        """Latents of the pictures to start from, (B, C, h, w), with noise as there is at `timestep`."""
        noise = self.first_noise(tuple(start.shape)).to(start)
        return self.sampler.noised(start, noise, timestep)

    def choose(self, pixels: Tensor, output: ImagesOutput) -> Tensor:
        """Of candidates the best, with their scores."""
        if self.reranker is None:
            return pixels
        from latentdiff.pipelines.core.candidates import best_of

        pictures = self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        withheld = output.nsfw_content_detected or [False] * self.count
        useless = [flag or i in self.faults for i, flag in enumerate(withheld)]
        numbers = (self.per_item, self.kept, self.reranker, useless, self.options.prompt_weights)
        best, output.scores = best_of(pictures, self.texts, *numbers)
        output.select(best)
        return pixels[best]


class TextToImagePipeline(TextPipeline):
    """Draws pictures from prompts: latent diffusion (Rombach et al. 2022) under classifier-free guidance.

    ``pipeline("a red car", seed=0).images[0]`` is a PIL image. With the same components, latents and scheduler the
    pictures are those of diffusers' ``StableDiffusionPipeline``, as which this one is saved.
    """

    saved_class_name = "StableDiffusionPipeline"
    call_class: ClassVar[type[TextCall]] = TextCall

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
        size = self.picture_size(options.height, options.width)
        call = self.call_class(self, options)
        schedule = call.timesteps()
        latents = call.first_latents(call.latents_shape(*size))
        return (yield from call.draw(call.denoiser(latents=latents), latents, schedule))
