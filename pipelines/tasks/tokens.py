"""Text to image by codes: a transformer over the codes of an autoencoder, and what all such pipelines share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Generator, Tensor

from latentdiff.conditioning import GuidedConditioning
from latentdiff.diffusion.tokens import ORDERS
from latentdiff.interchange.fingerprint import codes_digest
from latentdiff.models import DalleAutoencoder, FSQModel, GumbelVQModel, TokenTransformer, VQModel
from latentdiff.pipelines.core.call_options import StepCallback, TextExtras, TextOptions
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pipeline import LatentPipeline
from latentdiff.pipelines.core.sampling import Steps, whole
from latentdiff.pipelines.core.token_call import TokenCall, TokenOptions
from latentdiff.pipelines.tasks.text_to_image import TextCall
from latentdiff.text.encode import Prompts, TextConditioner

CodeAutoencoders = VQModel | GumbelVQModel | FSQModel | DalleAutoencoder
STEPS = 12
"""Of the masked order; MaskGIT and MUSE take 8 to 24."""


class CodesPipeline(LatentPipeline):
    """What the pipelines share whose pictures are codes: a `TokenTransformer` and the autoencoder whose codes they are.

    ``transformer`` is what other pipelines call ``unet``, and ``vqvae`` their ``vae``. There is no scheduler: the order
    in which the transformer was trained is that in which it draws.

    Raises:
        ValueError: the transformer was trained for the codes of another autoencoder.
    """

    for_runtimes = False
    unet_classes = ("TokenTransformer",)
    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    usual_defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    safety_checker = None
    feature_extractor = None
    made_for_steps = None
    transformer: Any
    vqvae: Any

    @property
    def unet(self) -> Any:
        return self.transformer

    @property
    def vae(self) -> Any:
        return self.vqvae

    @property
    def scheduler(self) -> Any:
        """The order in which codes are drawn."""
        return ORDERS[self.transformer.config.order]()

    @property
    def defaults(self) -> dict[str, Any]:
        """As of every pipeline; in raster order there is a step for each code."""
        found = super().defaults
        if self.fixed_steps is not None:
            found["num_inference_steps"] = self.fixed_steps
        return found

    @property
    def fixed_steps(self) -> int | None:
        """In raster order the number of codes; None: any number of steps may be asked for."""
        height, width = self.transformer.grid
        return height * width if self.transformer.causal else None

    def register_codes(self, transformer: Any, vqvae: Any, **parts: Any) -> None:
        """As `register_parts`. Raises ValueError if the two do not fit together."""
        self.register_parts(None, transformer=transformer, vqvae=vqvae, **parts)
        if vqvae is None or transformer is None:
            return
        if not hasattr(vqvae, "decode_from_indices"):
            raise ValueError(f"the vqvae is a {type(vqvae).__name__} without codes; give a VQModel or the like")
        if vqvae.codes != transformer.codes:
            raise ValueError(
                f"the transformer was trained for another autoencoder: it knows {transformer.codes} codes, and this "
                f"{type(vqvae).__name__} has {vqvae.codes}"
            )
        wanted, found = transformer.config.autoencoder_digest, codes_digest(vqvae)
        if wanted and found and wanted != found:
            raise ValueError(
                f"the transformer was trained for another autoencoder: its codes have the digest {wanted[:12]}..., and "
                f"those of this {type(vqvae).__name__} {found[:12]}...; its codes mean other things"
            )

    def optimize(self, **options: Any) -> Any:
        """Not for models of codes. Raises ValueError."""
        raise ValueError(f"a {type(self).__name__} cannot be optimized; it draws as it is")

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """As of every pipeline. Raises ValueError for one that is larger than in training, too."""
        size = super().picture_size(height, width)
        self.transformer.check_grid(*(side // self.vae_scale_factor for side in size))
        return size


@dataclass(frozen=True, kw_only=True)
class TokenTextOptions(TokenOptions, TextOptions):
    """Of a call with a prompt."""


class TokenTextCall(TokenCall, TextCall):
    """A call with prompts that draws codes."""

    options: TokenTextOptions


class TokenPipeline(CodesPipeline):
    """Draws pictures from prompts, code by code: ``pipeline("a red car", seed=0).images[0]``.

    DALL-E (Ramesh et al. 2021), MaskGIT (Chang et al. 2022), MUSE (Chang et al. 2023).

    Args:
        vqvae: (B, 3, H, W) to codes (B, h, w) and back.
        text_encoder, tokenizer: of transformers.
        transformer: knows how likely codes are, given text.

    Raises:
        ValueError: components that do not fit together.
    """

    saved_class_name = "TokenPipeline"
    for_sdxl: ClassVar[bool] = False
    for_pixart: ClassVar[bool] = False
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    text_encoder: Any
    tokenizer: Any

    reranker: Any = None
    """What ``candidates`` are compared with: a ``ClipScore``, or where to load one from."""

    def __init__(
        self,
        vqvae: CodeAutoencoders,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        transformer: TokenTransformer,
    ) -> None:
        super().__init__()
        self.register_codes(transformer, vqvae, text_encoder=text_encoder, tokenizer=tokenizer)

    def conditioner(
        self,
        device: torch.device,
        clip_skip: int | None = None,
        prompt_weights: bool = False,
        long_prompts: Literal["cut", "chunk"] = "cut",
    ) -> TextConditioner:
        """What makes conditions of prompts."""
        return TextConditioner(
            *(self.tokenizer, self.text_encoder, device),
            clip_skip=clip_skip,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
        )

    def condition(
        self, prompts: Prompts, conditioner: TextConditioner, guided: bool, lora_scale: float | None = None
    ) -> GuidedConditioning:
        """The conditions of P images, one of each prompt."""
        return prompts.encode(conditioner, guided)

    @whole
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: Generator | list[Generator] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_temperature: float = 2.0,
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[TextExtras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each prompt in turn, ``num_images_per_prompt``.

        Args:
            height, width: in pixels, multiples of the autoencoder's factor, at most those of the training.
            num_inference_steps: of the masked order; in raster order each code is a step.
            guidance_scale: of the logits, up to 1 there is none; by default the model's.
            output_type: "latent" are the codes, (B, 1, h, w).
            temperature: divides the logits; below 1 codes are likelier ones, at 0 the likeliest.
            top_k, top_p: draw from this many of the likeliest codes, or from those that together have this probability.
            mask_temperature: of the masked order, how much chance has a part in which codes are shown first; it falls
                to 0 with the steps. MaskGIT's code has 4.5.
            extras: ``prompt_weights``, ``long_prompts``, ``candidates`` and ``reranker``: see ``TextExtras``.
            others: as of ``TextToImagePipeline``.

        Raises:
            TypeError, ValueError: a value does not fit; the message says which and why.
        """
        options = TokenTextOptions.of(locals())
        for name in options.sdxl:
            raise ValueError(f"{name} is for SDXL, and this is a {type(self).__name__}; leave it out")
        size = self.picture_size(options.height, options.width)
        call = TokenTextCall(self, options)
        codes = call.hidden_codes(*size)
        return (yield from call.draw(call.token_denoiser(call.conditioning), codes, call.schedule(codes)))
