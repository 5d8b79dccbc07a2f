"""Latent pipelines that a prompt conditions, through a text encoder."""

from typing import Any, ClassVar, Literal

import diffusers
import torch
from torch import Tensor

from latentdiff.conditioning import GuidedConditioning
from latentdiff.models import UNet2DConditionModel
from latentdiff.pipelines.core.call import Call
from latentdiff.pipelines.core.denoiser import GuidedDenoiser, loras_at
from latentdiff.pipelines.core.options import TextOptions, check_count, refuse
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pictures import are_latents, check_pictures
from latentdiff.pipelines.core.pipeline import AnyAutoencoder, LatentPipeline
from latentdiff.pipelines.core.schedulers import modern_scheduler
from latentdiff.pipelines.storage.adapters import AdapterPipeline
from latentdiff.pipelines.storage.single_file import SingleFilePipeline
from latentdiff.pipelines.tasks.prompts import Prompts
from latentdiff.text.conditioner import TextConditioner


class TextPipeline(SingleFilePipeline, AdapterPipeline, LatentPipeline):
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
    ) -> tuple[Tensor, Tensor | None]:
        """Text states of prompts and negative prompts, (B, L, D) each, as a call makes them and takes them.

        The arguments are those of diffusers' method of this name, and those of a call.

        Raises:
            TypeError, ValueError: see `Prompts`.
        """
        prompts = Prompts.read(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        device = device or self._execution_device
        conditioner = self.conditioner(device, clip_skip, prompt_weights, long_prompts)
        conditioning = self.condition(prompts, conditioner, do_classifier_free_guidance, lora_scale)
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
        conditioning = conditioning.to(device, dtype).repeat(num_images_per_prompt)
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


class TextCall(Call):
    """A call with prompts: B images, for each prompt in turn ``num_images_per_prompt``, or as many candidates.

    Attributes:
        conditioning: of the B images.

    Raises:
        TypeError, ValueError: an option does not fit; the message says which and why.
    """

    pipeline: TextPipeline
    options: TextOptions

    def __init__(self, pipeline: TextPipeline, options: TextOptions) -> None:
        self.wanted = check_count(options.num_images_per_prompt)
        self.reranker: Any = None
        drawn = self.wanted if options.candidates is None else self._candidates(pipeline, options)
        if options.candidates is None and options.reranker is not None:
            raise ValueError("a reranker needs candidates=, how many pictures of each prompt to choose from")
        lora_scale = options.lora_scale
        prompts = Prompts.read(
            options.prompt, options.negative_prompt, options.prompt_embeds, options.negative_prompt_embeds
        )
        super().__init__(pipeline, options, len(prompts), drawn)
        self.view._clip_skip = options.clip_skip
        self.captions = prompts.captions(options.prompt_weights)
        conditioner = pipeline.conditioner(self.device, options.clip_skip, options.prompt_weights, options.long_prompts)
        conditioning = pipeline.condition(prompts, conditioner, self.guidance.active, lora_scale)
        self.conditioning = conditioning.to(self.device, pipeline.unet.dtype).repeat(drawn)

    def _candidates(self, pipeline: TextPipeline, options: TextOptions) -> int:
        """How many images of each prompt to draw, after what compares them is loaded."""
        from latentdiff.pipelines.core.candidates import check_candidates, load_reranker

        check_candidates(options.candidates, self.wanted)
        assert options.candidates is not None
        if options.output_type == "latent":
            raise ValueError("candidates are compared as pictures; output_type='latent' does not go with them")
        source = options.reranker or pipeline.reranker
        if source is None:
            raise ValueError(
                "candidates are compared by a CLIP model; give one with reranker=, such as "
                "'open_clip:ViT-B-32/laion2b_s34b_b79k' or the folder of a transformers CLIP, or set pipeline.reranker"
            )
        if options.prompt is None:
            raise ValueError("candidates are compared with the prompt; give it as text, not as prompt_embeds")
        self.reranker = load_reranker(source, pipeline._execution_device)
        return options.candidates

    def denoiser(self, conditioning: GuidedConditioning | None = None, **options: Any) -> GuidedDenoiser:
        """The UNet with this call's prompts and guidance; `conditioning`: with more than that."""
        lora_scale = self.options.lora_scale
        return super().denoiser(conditioning or self.conditioning, lora_scale=lora_scale, **options)

    def start_latents(self, pixels: Tensor, name: str = "image") -> Tensor:
        """Given pictures (P, 3, H, W), or latents, as the scaled latents (B, C, h, w) of the images.

        Raises:
            ValueError: neither one, nor one for each prompt.
        """
        check_pictures(name, len(pixels), self.items, self.count)
        if are_latents(pixels, self.codec.channels):
            latents = pixels.repeat_interleave(self.count // len(pixels), dim=0)
        else:
            latents = self.codec.encode(pixels, self.noise.generator, self.count)
        return latents.to(self.device, self.pipeline.unet.dtype)

    def choose(self, pixels: Tensor, output: ImagesOutput) -> Tensor:
        """Of candidates the best, with their scores."""
        if self.reranker is None:
            return pixels
        from latentdiff.pipelines.core.candidates import best_of

        pictures = self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        flags = output.nsfw_content_detected
        best, output.scores = best_of(pictures, self.captions or [], self.per_item, self.wanted, self.reranker, flags)
        if flags is not None:
            output.nsfw_content_detected = [flags[i] for i in best]
        if output.seeds is not None:
            output.seeds = [output.seeds[i] for i in best]
        return pixels[best]
