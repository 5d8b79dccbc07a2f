"""Pictures of a class, or of whatever was trained on, by codes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Generator

from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.models import TokenTransformer
from latentdiff.pipelines.core.call_options import GuidedOptions, StepCallback, are_several, positive_whole
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.sampling import Steps, whole
from latentdiff.pipelines.core.token_call import TokenCall, TokenOptions
from latentdiff.pipelines.tasks.class_conditional import Label, class_number
from latentdiff.pipelines.tasks.tokens import STEPS, CodeAutoencoders, CodesPipeline


@dataclass(frozen=True, kw_only=True)
class ClassTokenOptions(TokenOptions, GuidedOptions):
    """Of a call with classes."""

    class_labels: Label | Sequence[Label]
    num_images_per_class: Annotated[int | None, positive_whole] = 1


class ClassTokenPipeline(CodesPipeline):
    """Draws pictures of classes, code by code: ``pipeline("bird", seed=0).images[0]``.

    Taming Transformers (Esser et al. 2021), Sec. 4.1; MaskGIT (Chang et al. 2022).

    Args:
        transformer: with ``num_classes``, and what stands for none of them.
        vqvae: whose codes they are.
        id2label: names of the classes, by number from 0; of one class several names may be given, with commas between.

    Raises:
        ValueError: components that do not fit together.
    """

    saved_class_name = "ClassTokenPipeline"
    model_cpu_offload_seq = "transformer->vqvae"

    def __init__(
        self, transformer: TokenTransformer, vqvae: CodeAutoencoders, id2label: Mapping[Any, str] | None = None
    ) -> None:
        super().__init__()
        self.register_codes(transformer, vqvae)
        names = None if id2label is None else {int(number): str(name) for number, name in id2label.items()}
        self.register_to_config(id2label=names)
        known = transformer.config.num_classes
        if known is None or (names is not None and sorted(names) != list(range(known))):
            raise ValueError(f"the transformer knows {known or 'no'} classes, and id2label names {len(names or ())}")

    @property
    def num_classes(self) -> int:
        return int(self.transformer.config.num_classes)

    def label_numbers(self, class_labels: Label | Sequence[Label]) -> list[int]:
        """Numbers of classes, from numbers or names. Raises TypeError, ValueError: there are no such classes."""
        given: Any = class_labels if are_several(class_labels) else [class_labels]
        numbers = [class_number(label, self.config.id2label or {}, self.num_classes) for label in given]
        if not numbers:
            raise ValueError("class_labels is empty; give one class or more")
        return numbers

    @whole
    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label],
        guidance_scale: float | Sequence[float] | None = None,
        generator: Generator | list[Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        num_images_per_class: int = 1,
        height: int | None = None,
        width: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_temperature: float = 2.0,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **extras: Any,
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each class in turn, ``num_images_per_class``.

        Args:
            class_labels: numbers or names of classes.
            others: as of ``TokenPipeline``.

        Raises:
            TypeError, ValueError: a value does not fit; the message says which and why.
        """
        options = ClassTokenOptions.of(locals())
        numbers = self.label_numbers(class_labels)
        size = self.picture_size(options.height, options.width)
        call = TokenCall(self, options, len(numbers), options.num_images_per_class or 1)
        labels = torch.tensor(numbers, device=call.device).repeat_interleave(call.per_item)
        none = Conditioning(labels=torch.full_like(labels, self.num_classes)) if call.guidance.active else None
        conditioning = GuidedConditioning(Conditioning(labels=labels), none)
        codes = call.hidden_codes(*size)
        return (yield from call.draw(call.token_denoiser(conditioning), codes, call.schedule(codes)))


@dataclass(frozen=True, kw_only=True)
class UnconditionalTokenOptions(TokenOptions):
    """Of a call without conditions."""

    batch_size: Annotated[int | None, positive_whole] = 1


class UnconditionalTokenPipeline(CodesPipeline):
    """Draws whatever its transformer was trained on, code by code: ``pipeline(batch_size=4, seed=0).images``.

    Args:
        transformer: without conditions.
        vqvae: whose codes they are.
    """

    saved_class_name = "UnconditionalTokenPipeline"
    usual_defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": STEPS}
    model_cpu_offload_seq = "transformer->vqvae"

    def __init__(self, transformer: TokenTransformer, vqvae: CodeAutoencoders) -> None:
        super().__init__()
        self.register_codes(transformer, vqvae)

    @whole
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator | list[Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        height: int | None = None,
        width: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_temperature: float = 2.0,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **extras: Any,
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw B = ``batch_size`` pictures; the arguments are those of ``TokenPipeline``.

        Raises:
            TypeError, ValueError: a value does not fit; the message says which and why.
        """
        options = UnconditionalTokenOptions.of(locals())
        size = self.picture_size(options.height, options.width)
        call = TokenCall(self, options, options.batch_size or 1)
        codes = call.hidden_codes(*size)
        denoiser = call.token_denoiser(GuidedConditioning(Conditioning()))
        return (yield from call.draw(denoiser, codes, call.schedule(codes)))
