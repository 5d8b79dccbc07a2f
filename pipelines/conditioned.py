"""Latent pipelines that a prompt conditions, through a text encoder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor

from latentdiff.models import UNet2DConditionModel
from latentdiff.models.lora_scale import lora_scaled
from latentdiff.pipelines import steps
from latentdiff.pipelines.adapters import AdapterPipeline
from latentdiff.pipelines.base import AnyAutoencoder, LatentPipeline, check_count, check_output_type
from latentdiff.pipelines.drawing import Drawing, TextExtras, refuse_unknown
from latentdiff.pipelines.noise import Generators
from latentdiff.pipelines.pictures import are_latents, check_pictures
from latentdiff.pipelines.prompts import PromptEncoder, count_prompts
from latentdiff.pipelines.schedulers import modern_scheduler
from latentdiff.pipelines.single_file import SingleFilePipeline
from latentdiff.text.weights import without_weights


class TextPipeline(SingleFilePipeline, AdapterPipeline, LatentPipeline):
    """What the pipelines with a text encoder share: their components, and how a call begins.

    Args:
        vae: (B, 3, H, W) to latents and back; ``config.scaling_factor`` brings the latents to unit variance.
        text_encoder, tokenizer: of transformers.
        unet: the denoiser.
        scheduler: any of diffusers' with ``step``. As in diffusers' pipeline, an old config with ``steps_offset``
            other than 1 or with ``clip_sample`` is brought up to date (in a copy).
        safety_checker, feature_extractor: of Stable Diffusion 1; both or none. What it withholds is black, the output
            and the log say which.
        image_encoder: must be None (no IP-Adapter).
        requires_safety_checker: kept for diffusers.

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
        long_prompts: str = "cut",
    ) -> tuple[Tensor, Tensor | None]:
        """Text states of prompts and negative prompts, (B, L, D) each, as a call makes them and takes them.

        The arguments are those of diffusers' method of this name, and those of a call.

        Raises:
            TypeError, ValueError: see `PromptEncoder.encode`.
        """
        encoder = PromptEncoder(
            self.tokenizer,
            self.text_encoder,
            device or self._execution_device,
            self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype,
            num_images_per_prompt,
            clip_skip,
            prompt_weights,
            long_prompts,
        )
        with self.lora_scale(None if lora_scale is None else {"scale": lora_scale}):
            return encoder.encode(
                prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, do_classifier_free_guidance
            )

    def begin(
        self,
        *,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        num_images_per_prompt: int | None,
        guidance_scale: float | Sequence[float] | None,
        guidance_rescale: float,
        clip_skip: int | None,
        generator: Generators,
        seed: int | Sequence[int] | None,
        output_type: str,
        return_dict: bool,
        extras: TextExtras,
    ) -> Drawing:
        """Look over what all calls have in common, read the prompts, and say how many images there will be.

        Raises:
            TypeError: a prompt or a seed is of a wrong type, or an argument is unknown.
            ValueError: a value does not fit, or something is not supported; the message says which and why.
        """
        refuse_unknown(extras, TextExtras)
        check_output_type(output_type)
        kept = check_count(num_images_per_prompt)
        drawn, reranker = self._candidates(kept, output_type, extras)
        if reranker is not None and prompt is None:
            raise ValueError("candidates are compared with the prompt; give it as text, not as prompt_embeds")
        prompts = count_prompts(prompt, prompt_embeds)
        self.set_guidance(guidance_scale, guidance_rescale, extras.get("guidance_interval"), prompts, drawn)
        self._clip_skip = clip_skip
        encoder = PromptEncoder(
            self.tokenizer,
            self.text_encoder,
            self._execution_device,
            self.unet.dtype,
            drawn,
            clip_skip,
            extras.get("prompt_weights", False),
            extras.get("long_prompts", "cut"),
        )
        positive, negative = encoder.encode(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, self.guidance.active
        )  # (B, L, D) each
        count = len(positive)
        prompts_read = [prompt] if isinstance(prompt, str) else prompt
        if prompts_read is not None and extras.get("prompt_weights", False):
            prompts_read = [without_weights(one) for one in prompts_read]
        noise, seeds = self.noise_source(count, seed, generator, extras)
        return Drawing(
            embeds=positive if negative is None else torch.cat([negative, positive]),
            count=count,
            noise=noise,
            seeds=seeds,
            output_type=output_type,
            return_dict=return_dict,
            prompts=prompts_read,
            drawn=drawn,
            kept=kept,
            reranker=reranker,
        )

    def start_latents(self, drawing: Drawing, pixels: Tensor, name: str = "image") -> Tensor:
        """Given pictures (P, 3, H, W), or latents, as the latents (B, C, h, w) of a drawing's images.

        Raises:
            ValueError: neither one, nor one for each prompt.
        """
        check_pictures(name, len(pixels), drawing.count // drawing.drawn, drawing.count)
        pixels = pixels.to(self._execution_device)
        if are_latents(pixels, self.vae.config.latent_channels):
            latents = pixels.repeat_interleave(drawing.count // len(pixels), dim=0)
        else:
            latents = steps.encode(self.vae, pixels, drawing.noise.generator, drawing.count)
        return latents.to(self.unet.dtype)

    @contextmanager
    def lora_scale(self, cross_attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Within, loaded LoRAs act as strongly as ``{"scale": ...}`` says.

        Raises:
            ValueError: something else is asked for.
        """
        asked = dict(cross_attention_kwargs or {})
        scale = asked.pop("scale", None)
        if asked:
            raise ValueError(f"cross_attention_kwargs: {', '.join(asked)} is not supported, only 'scale'")
        if scale is None:
            yield
        else:
            with lora_scaled([self.unet, self.text_encoder], scale):
                yield

    def _candidates(self, kept: int, output_type: str, extras: TextExtras) -> tuple[int, Any]:
        """How many images of each prompt to draw, and what compares them, if anything does."""
        candidates = extras.get("candidates")
        if candidates is None:
            if extras.get("reranker") is not None:
                raise ValueError("a reranker needs candidates=, how many pictures of each prompt to choose from")
            return kept, None
        from latentdiff.pipelines.reranking import check_candidates, load_reranker

        check_candidates(candidates, kept)
        if output_type == "latent":
            raise ValueError("candidates are compared as pictures; output_type='latent' does not go with them")
        source = extras.get("reranker") or self.reranker
        if source is None:
            raise ValueError(
                "candidates are compared by a CLIP model; give one with reranker=, such as "
                "'open_clip:ViT-B-32/laion2b_s34b_b79k' or the folder of a transformers CLIP, or set pipeline.reranker"
            )
        return candidates, load_reranker(source, self._execution_device)


def refuse(**arguments: Any) -> None:
    """Raises ValueError for arguments of diffusers' call that are given and not supported."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported")
