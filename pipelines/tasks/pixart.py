"""PixArt-alpha (Chen et al. 2023): a transformer that reads the states of T5, or of any other text encoder."""

from typing import Any, ClassVar, Literal

import diffusers
import torch
from torch import Tensor

from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.models import PixArtTransformer2DModel
from latentdiff.pipelines.core.call_options import TextOptions, never
from latentdiff.pipelines.core.pipeline import AnyAutoencoder
from latentdiff.pipelines.tasks.dit import TransformerPipeline
from latentdiff.pipelines.tasks.image_to_image import ImageToImagePipeline
from latentdiff.pipelines.tasks.inpaint import InpaintPipeline
from latentdiff.pipelines.tasks.text_to_image import TextPipeline, TextToImagePipeline
from latentdiff.text.encode import Prompts, TextConditioner
from latentdiff.text.masked import LONGEST, MaskedTextConditioner, counting, with_mask


class PixArtPipeline(TransformerPipeline, TextPipeline):
    """What PixArt's pipelines have besides Stable Diffusion's: `TextToImagePipeline` and its relatives say how to call.

    ``TextToImagePipeline.from_pretrained`` of a PixArt folder gives such a pipeline. With the same components, latents
    and scheduler the pictures are those of diffusers' ``PixArtAlphaPipeline``, as which this one is saved, called with
    ``clean_caption=False, use_resolution_binning=False``. Prompts have up to 120 tokens, or as many as the encoder
    takes. States that are given as ``prompt_embeds`` count unless they are zero all through, as `encode_prompt` gives
    those of padding.

    Args:
        tokenizer, text_encoder: of transformers.
        vae: as of ``TextToImagePipeline``.
        transformer: a ``PixArtTransformer2DModel``; one with additional conditions is told the size of the pictures.
        scheduler: any of diffusers' with ``step``.

    Raises:
        ValueError: components that do not fit together.
    """

    safety_checker: Any = None
    for_pixart: ClassVar[bool] = True

    saved_class_name = "PixArtAlphaPipeline"
    usual_defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 20, "guidance_scale": 4.5}
    unet_classes = ("PixArtTransformer2DModel",)
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer", "text_encoder"]
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["tokenizer", "text_encoder"]

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: torch.nn.Module | None,
        vae: AnyAutoencoder,
        transformer: PixArtTransformer2DModel | diffusers.PixArtTransformer2DModel,
        scheduler: Any,
    ) -> None:
        super(TextPipeline, self).__init__()
        self.register_parts(scheduler, tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer)

    @property
    def diffusers_options(self) -> dict[str, Any]:  # type: ignore[override]
        """That the prompt is not rewritten, that any size is drawn, and how many tokens the encoder takes."""
        length = self.conditioner(torch.device("cpu")).length
        return {
            "clean_caption": False,
            "use_resolution_binning": False,
            **({"max_sequence_length": length} if length < LONGEST else {}),
        }

    def conditioner(
        self,
        device: torch.device,
        clip_skip: int | None = None,
        prompt_weights: bool = False,
        long_prompts: Literal["cut", "chunk"] = "cut",
    ) -> TextConditioner:
        return MaskedTextConditioner(
            self.tokenizer,
            self.text_encoder,
            device,
            clip_skip=clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
        )

    @torch.no_grad()
    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: Literal[False] = False,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Text states (B, L, D) of prompts and what counts of them (B, L), then both of negative prompts.

        As a call makes and takes them and, in this order, diffusers' method of this name.

        Args:
            options: ``lora_scale``, ``clip_skip``, ``prompt_weights``, ``long_prompts``, as in a call.

        Raises:
            TypeError, ValueError: see a call.
        """
        never(clean_caption, "clean_caption")
        states, negative = super().encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            counting(prompt_embeds, prompt_attention_mask, "prompt"),
            counting(negative_prompt_embeds, negative_prompt_attention_mask, "negative_prompt"),
            max_sequence_length=max_sequence_length,
            **options,
        )
        counts = [None if part is None else (part != 0).any(-1).long() for part in (states, negative)]
        assert counts[0] is not None
        return states, counts[0], negative, counts[1]

    def condition(
        self, prompts: Prompts, conditioner: TextConditioner, guided: bool, lora_scale: float | None = None
    ) -> GuidedConditioning:
        """The conditions of P images, but for the sizes; with masks of states that are given, too."""
        found = super().condition(prompts, conditioner, guided, lora_scale)
        negative = found.negative
        return GuidedConditioning(with_mask(found.positive), None if negative is None else with_mask(negative))

    def with_sizes(
        self, conditioning: GuidedConditioning, options: TextOptions, height: int, width: int
    ) -> GuidedConditioning:
        """With height, width and their ratio, (P, 3), if the transformer takes them."""
        conditioning = super().with_sizes(conditioning, options, height, width)
        config = self.transformer.config
        asked = config.use_additional_conditions
        if not (config.sample_size == 128 if asked is None else asked):
            return conditioning
        sizes = torch.tensor([height, width, height / width])

        def told(part: Conditioning) -> Conditioning:
            states = part.states
            assert states is not None
            return part.replace(sizes=sizes.to(states).expand(len(states), -1))

        negative = conditioning.negative
        return GuidedConditioning(told(conditioning.positive), None if negative is None else told(negative))


class PixArtTextToImagePipeline(PixArtPipeline, TextToImagePipeline):
    """`TextToImagePipeline` of PixArt's models."""


class PixArtImageToImagePipeline(PixArtPipeline, ImageToImagePipeline):
    """`ImageToImagePipeline` of PixArt's models; saved for text to image, as diffusers has no pipeline for this."""


class PixArtInpaintPipeline(PixArtPipeline, InpaintPipeline):
    """`InpaintPipeline` of PixArt's models; saved for text to image, as diffusers has no pipeline for this."""
