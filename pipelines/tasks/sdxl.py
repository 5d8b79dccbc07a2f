"""SDXL (Podell et al. 2023): two text encoders, and a UNet that is told how its pictures were scaled and cut."""

from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from torch import Tensor

from latentdiff.conditioning import GuidedConditioning
from latentdiff.interchange.adapter_files import name_of
from latentdiff.interchange.embeddings import OF_TWO, find_joint_embeddings
from latentdiff.models import UNet2DConditionModel
from latentdiff.models.loras import whole_network
from latentdiff.pipelines.core.call_options import TextOptions, positive_whole, refuse
from latentdiff.pipelines.core.denoiser import loras_at
from latentdiff.pipelines.core.pipeline import AnyAutoencoder
from latentdiff.pipelines.storage.textual_inversion import check_new_word, vectors_of
from latentdiff.pipelines.tasks.image_to_image import ImageToImagePipeline
from latentdiff.pipelines.tasks.inpaint import Canvas, InpaintPipeline, MaskOptions, PaintingCall
from latentdiff.pipelines.tasks.text_to_image import TextCall, TextPipeline, TextToImagePipeline
from latentdiff.text.encode import Prompts, TextConditioner
from latentdiff.text.two_encoders import JointTextConditioner
from latentdiff.text.words import taught_words

EXPLAINED = {
    5: "it is a refiner's, which takes an aesthetic score instead of the target size: load it with "
    "ImageToImagePipeline, and its model_index.json must say requires_aesthetics_score",
    6: "it takes no aesthetic score: its model_index.json must not say requires_aesthetics_score",
}
USUAL = {"num_inference_steps": 50, "guidance_scale": 5.0}  # of diffusers' StableDiffusionXLPipeline


class SDXLPipeline(TextPipeline):
    """What SDXL's pipelines have besides Stable Diffusion's: `TextToImagePipeline` and its relatives say how to call.

    ``TextToImagePipeline.from_pretrained`` of an SDXL folder gives such a pipeline. A call takes ``prompt_2``,
    ``original_size``, ``crops_coords_top_left``, ``target_size`` and ``pooled_prompt_embeds``, with the negative ones,
    too: see ``TextExtras``.

    Args:
        vae: in half precision one whose config says ``force_upcast`` is brought to float32, where alone it is finite.
        text_encoder, tokenizer: CLIP's; both None in a model with the second encoder alone.
        text_encoder_2, tokenizer_2: CLIP's with a projection, which makes the pooled embedding.
        unet: with ``addition_embed_type="text_time"``.
        scheduler: any of diffusers' with ``step``.
        image_encoder, feature_extractor: of IP-Adapters; kept and saved, and not used.
        force_zeros_for_empty_prompt: zeros stand for a negative prompt that is not given.
        add_watermarker: must not be true.

    Raises:
        ValueError: components that do not fit together.
    """

    text_encoder_2: Any
    tokenizer_2: Any
    safety_checker: Any = None

    refiner: Any = None
    """Another SDXL pipeline, of pictures, that draws the last steps of what commands ask for."""

    save_lora_weights: Any = classmethod(StableDiffusionXLLoraLoaderMixin.save_lora_weights.__func__)

    _lora_loadable_modules: ClassVar[list[str]] = ["unet", "text_encoder", "text_encoder_2"]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    usual_defaults: ClassVar[dict[str, Any]] = USUAL
    for_runtimes: ClassVar[bool] = False
    for_sdxl: ClassVar[bool] = True
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "image_encoder", "feature_extractor"]

    def __init__(
        self,
        vae: AnyAutoencoder,
        text_encoder: torch.nn.Module | None,
        text_encoder_2: torch.nn.Module,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel,
        scheduler: Any,
        image_encoder: torch.nn.Module | None = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super(TextPipeline, self).__init__()
        refuse(add_watermarker=add_watermarker or None)
        check_flag("force_zeros_for_empty_prompt", force_zeros_for_empty_prompt)
        if unet is not None and getattr(unet.config, "addition_embed_type", None) != "text_time":
            raise ValueError(
                f"a {type(self).__name__} needs a UNet with addition_embed_type='text_time', and this one has "
                f"{getattr(unet.config, 'addition_embed_type', None)!r}: it is not SDXL's"
            )
        if text_encoder_2 is not None and not hasattr(text_encoder_2, "text_projection"):
            raise ValueError(
                f"text_encoder_2 must be a CLIPTextModelWithProjection, whose pooled embedding the UNet takes, not a "
                f"{type(text_encoder_2).__name__}"
            )
        if vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
            vae.to(torch.float32)
        self.register_parts(
            scheduler,
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)

    def load_textual_inversion(  # type: ignore[override]
        self, source: Any, token: str | None = None, *, weight_name: str | None = None, **hub: Any
    ) -> None:
        """Teach both text encoders a new word; a refiner's, which is the second, by the vectors of the second.

        Args:
            source: a safetensors file with ``clip_l`` and ``clip_g``, such as `latentdiff finetune` makes, its folder,
                an ``owner/name`` on the hub, or the tensors by these names.
            token: the word; by default what the file says, or else its name.
            weight_name, hub: as for `load_lora_weights`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another kind, is damaged or of another width; or the word is known already. Nothing is
                changed then.
        """
        parts = self._text_parts
        hub = {key: value for key, value in hub.items() if key != "use_safetensors"}
        word, vectors = find_joint_embeddings(source, token, weight_name, hub, second_alone=len(parts) == 1)
        for own, (tokenizer, text_encoder) in zip(vectors, parts, strict=True):
            check_new_word(name_of(source), word, own, tokenizer, whole_network(text_encoder))
        for own, part in zip(vectors, parts, strict=True):
            super().load_textual_inversion({word: own}, word, *part)

    def unload_textual_inversion(self, tokens: Any = None) -> None:  # type: ignore[override]
        """Forget words that were loaded, all by default, in all text encoders.

        Raises:
            ValueError: a word was not loaded.
        """
        for part in self._text_parts:
            super().unload_textual_inversion(tokens, *part)

    def unknown_words(self, other: "SDXLPipeline") -> list[str]:
        """The words that `other` was taught, and this pipeline was not."""
        known = taught_words(self.tokenizer_2)
        return [word for word in taught_words(other.tokenizer_2) if word not in known]

    def learn_words(self, other: "SDXLPipeline") -> None:
        """Learn the words that `other` was taught; so a refiner understands what its base model does.

        Raises:
            ValueError: the text encoders are of other widths.
        """
        for word in self.unknown_words(other):
            vectors = [vectors_of(word, *part) for part in other._text_parts]
            self.load_textual_inversion(dict(zip(OF_TWO[-len(vectors) :], vectors, strict=True)), word)

    @property
    def takes_scores(self) -> bool:
        """Whether the UNet is told an aesthetic score instead of the target size."""
        return bool(self.config.get("requires_aesthetics_score", False))

    @property
    def _text_parts(self) -> list[tuple[Any, Any]]:
        """Tokenizer and text encoder of each; a refiner has the second alone."""
        first = [] if self.text_encoder is None else [(self.tokenizer, self.text_encoder)]
        return [*first, (self.tokenizer_2, self.text_encoder_2)]

    @torch.no_grad()
    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        *,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_weights: bool = False,
        long_prompts: Literal["cut", "chunk"] = "cut",
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """States (B, L, D) of prompts and negative prompts, then the pooled embeddings (B, D') of both; as a call
        makes them and, in this order, diffusers' method of this name.

        Raises:
            TypeError, ValueError: see `Prompts`.
        """
        conditioner = self.conditioner(device or self._execution_device, clip_skip, prompt_weights, long_prompts)
        conditioning = self.condition(
            Prompts(prompt, negative_prompt, prompt_2=prompt_2, negative_prompt_2=negative_prompt_2),
            conditioner,
            do_classifier_free_guidance,
            lora_scale,
        ).repeat(positive_whole(num_images_per_prompt, "num_images_per_prompt"))
        positive, negative = conditioning.positive, conditioning.negative
        if negative is None:
            return positive.states, None, positive.pooled, None
        return positive.states, negative.states, positive.pooled, negative.pooled

    def conditioner(
        self,
        device: torch.device,
        clip_skip: int | None = None,
        prompt_weights: bool = False,
        long_prompts: Literal["cut", "chunk"] = "cut",
    ) -> JointTextConditioner:
        """Of both text encoders."""
        return JointTextConditioner(
            self.tokenizer_2,
            self.text_encoder_2,
            device,
            clip_skip=clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
            zeros_for_none=bool(self.config.force_zeros_for_empty_prompt),
            first=None if self.text_encoder is None else (self.tokenizer, self.text_encoder),
        )

    def condition(
        self, prompts: Prompts, conditioner: TextConditioner, guided: bool, lora_scale: float | None = None
    ) -> GuidedConditioning:
        """The conditions of P images, one of each prompt, but for the sizes.

        Raises:
            ValueError: states are given without the pooled embedding.
        """
        with loras_at(lora_scale, self.text_encoder_2):
            found = super().condition(prompts, conditioner, guided, lora_scale)
        for side, part in (("", found.positive), ("negative_", found.negative)):
            if part is not None and part.pooled is None:
                raise ValueError(
                    f"{side}prompt_embeds are given without {side}pooled_prompt_embeds, which SDXL's UNet takes too; "
                    f"encode_prompt gives both"
                )
        return found

    def with_sizes(
        self, conditioning: GuidedConditioning, options: TextOptions, height: int, width: int
    ) -> GuidedConditioning:
        """With original size, crop and target size, (P, 6); see ``TextExtras`` for the defaults.

        With original size, crop and aesthetic score, (P, 5), where the UNet takes that.

        Raises:
            ValueError: a score is given that the UNet does not take, or it takes other numbers.
        """
        drawn, scored = (height, width), self.takes_scores
        crop, original = options.crops_coords_top_left or (0, 0), options.original_size or drawn
        both = options.negative_original_size is not None and options.negative_target_size is not None
        without = options.negative_crops_coords_top_left or ((0, 0) if both or scored else crop)
        target, scores = options.target_size or drawn, (options.aesthetic_score, options.negative_aesthetic_score)
        ends: list[tuple[float, ...]] = [target, options.negative_target_size or target]
        if scored:
            ends = [(6.0 if scores[0] is None else scores[0],), (2.5 if scores[1] is None else scores[1],)]
        elif scores != (None, None):
            raise ValueError("this model's UNet takes no aesthetic_score, which is for SDXL's refiner; leave it out")
        sides = [
            (conditioning.positive, (*original, *crop, *ends[0])),
            (conditioning.negative, (*(options.negative_original_size or original), *without, *ends[1])),
        ]
        positive, negative = (
            None if part is None else part.replace(time_ids=self.told(numbers, part.pooled)) for part, numbers in sides
        )
        assert positive is not None
        return GuidedConditioning(positive, negative)

    def told(self, numbers: tuple[float, ...], pooled: Tensor | None) -> Tensor:
        """The same numbers for each of B images, (B, N), where their pooled embeddings are."""
        assert pooled is not None
        config = self.unet.config
        taken = (config.projection_class_embeddings_input_dim - pooled.shape[-1]) / config.addition_time_embed_dim
        if taken != len(numbers):
            raise ValueError(
                f"this model's UNet takes {taken:g} numbers besides a pooled embedding of {pooled.shape[-1]}, and "
                f"{len(numbers)} are given: {EXPLAINED.get(taken, 'its config does not fit the text encoder')}"
            )
        return torch.tensor(numbers, dtype=torch.float32, device=pooled.device).expand(len(pooled), -1)


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError for what is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")


class SDXLCall(TextCall):
    """A call that may draw a part of the way from noise, before another model or after it."""

    def timesteps(self, strength: float | None = None) -> Tensor:
        """See `Call.timesteps`; of these, those between ``denoising_start`` and ``denoising_end``."""
        start, end = self.options.denoising_start, self.options.denoising_end
        if start is not None and strength is None:
            raise ValueError("denoising_start needs the latents to go on with: give them to ImageToImagePipeline")
        if start is not None and end is not None and start >= end:  # diffusers' words, which programs look for
            raise ValueError(f"`denoising_start`: {start} cannot be larger than or equal to `denoising_end`: {end}")
        timesteps = super().timesteps(strength if start is None else None)
        return timesteps if start is end else self.sampler.between(timesteps, start, end)

    def noised_start(self, start: Tensor, timestep: Tensor) -> Tensor:
        return start if self.options.denoising_start is not None else super().noised_start(start, timestep)


class SDXLPaintingCall(SDXLCall, PaintingCall):
    """The same within a mask."""

    options: MaskOptions

    def first_painting(self, canvas: Canvas, shape: tuple[int, ...], schedule: Tensor, plain: bool) -> Tensor:
        noisy = super().first_painting(canvas, shape, schedule, plain)
        if self.options.denoising_start is None:
            return noisy
        return self.start_latents(canvas.pixels) if self.start is None else self.start


class SDXLTextToImagePipeline(SDXLPipeline, TextToImagePipeline):
    """`TextToImagePipeline` of SDXL's models; saved as diffusers' ``StableDiffusionXLPipeline``."""

    saved_class_name = "StableDiffusionXLPipeline"
    call_class: ClassVar[type[TextCall]] = SDXLCall


class ScoredPipeline(SDXLPipeline):
    """What SDXL's pipelines of pictures have besides: their UNet may take an aesthetic score, as the refiner's does.

    Args:
        requires_aesthetics_score: it does, instead of the target size.
        others: as for `SDXLPipeline`.
    """

    def __init__(
        self,
        vae: AnyAutoencoder,
        text_encoder: torch.nn.Module | None,
        text_encoder_2: torch.nn.Module,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: UNet2DConditionModel | diffusers.UNet2DConditionModel,
        scheduler: Any,
        image_encoder: torch.nn.Module | None = None,
        feature_extractor: Any = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        check_flag("requires_aesthetics_score", requires_aesthetics_score)
        parts = (vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler)
        super().__init__(*parts, image_encoder, feature_extractor, force_zeros_for_empty_prompt, add_watermarker)
        self.register_to_config(requires_aesthetics_score=requires_aesthetics_score)


class SDXLImageToImagePipeline(ScoredPipeline, ImageToImagePipeline):
    """`ImageToImagePipeline` of SDXL's models; saved as diffusers' ``StableDiffusionXLImg2ImgPipeline``."""

    saved_class_name = "StableDiffusionXLImg2ImgPipeline"
    call_class: ClassVar[type[TextCall]] = SDXLCall


class SDXLInpaintPipeline(ScoredPipeline, InpaintPipeline):
    """`InpaintPipeline` of SDXL's models; saved as diffusers' ``StableDiffusionXLInpaintPipeline``."""

    saved_class_name = "StableDiffusionXLInpaintPipeline"
    call_class: ClassVar[type[PaintingCall]] = SDXLPaintingCall
    usual_defaults: ClassVar[dict[str, Any]] = {**USUAL, "guidance_scale": 7.5}
