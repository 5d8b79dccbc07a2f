"""Pictures of a class: under classifier guidance, classifier-free guidance, or both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Unpack

import diffusers
import torch
from torch import Generator, Tensor

from latentdiff.conditioning import Conditioning, GuidedConditioning, other_classes
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.models import NoisyClassifier, UNet2DModel
from latentdiff.pipelines.core.call import Call
from latentdiff.pipelines.core.call_options import (
    Extras,
    GuidedOptions,
    StepCallback,
    are_several,
    positive_whole,
    real_number,
    whole_number,
)
from latentdiff.pipelines.core.output import ImagesOutput
from latentdiff.pipelines.core.pipeline import AnyAutoencoder
from latentdiff.pipelines.core.sampling import Progress, Sampler, Steps, whole
from latentdiff.pipelines.tasks.unconditional import TextlessPipeline

Label = int | str
SHOWN = 5  # classes of one name in a message
MEANS = ("DDPMScheduler", "DDPMParallelScheduler")
"""Schedulers that draw each step from a Gaussian, whose mean is shifted."""


@dataclass(frozen=True, kw_only=True)
class ClassOptions(GuidedOptions):
    """Of a call with classes."""

    class_labels: Label | Sequence[Label]
    classifier_scale: Annotated[float, real_number] = 1.0
    num_images_per_class: Annotated[int | None, positive_whole] = 1


class ClassConditionalPipeline(TextlessPipeline):
    """Draws pictures of classes: ``pipeline("bird", guidance_scale=3, seed=0).images[0]``.

    ADM ("Diffusion Models Beat GANs on Image Synthesis", Dhariwal & Nichol 2021): a classifier's gradient guides the
    sampler (Sec. 4), also that of a UNet which knows no classes. Classifier-free guidance (Ho & Salimans 2022) needs a
    UNet with one class embedding more than there are classes; the last one stands for no class, as in DiT.

    Args:
        unet: in pixels or in the latents of `vqvae`.
        scheduler: any of diffusers' with ``step``.
        vqvae: None: pixels.
        classifier: of the same noisy pixels or latents; trained on the same process.
        id2label: names of the classes, by number from 0; of one class several names may be given, with commas between.

    Raises:
        ValueError: components that do not fit together.
    """

    saved_class_name = "ClassConditionalPipeline"
    usual_defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 50, "guidance_scale": 1.0}
    model_cpu_offload_seq = "unet->vqvae"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["classifier"]
    _optional_components: ClassVar[list[str]] = ["vqvae", "classifier"]

    classifier: Any

    def __init__(
        self,
        unet: UNet2DModel | diffusers.UNet2DModel,
        scheduler: Any,
        vqvae: AnyAutoencoder | None = None,
        classifier: NoisyClassifier | None = None,
        id2label: Mapping[Any, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_parts(scheduler, unet=unet, vqvae=vqvae, classifier=classifier)
        names = None if id2label is None else {int(number): str(name) for number, name in id2label.items()}
        self.register_to_config(id2label=names)
        self.check_classes()

    @property
    def id2label(self) -> dict[int, str] | None:
        return self.config.id2label

    @property
    def class_embeds(self) -> int | None:
        """How many class embeddings the denoiser has; None: it knows no classes."""
        number = self.unet.config.num_class_embeds
        return None if number is None else int(number)

    @property
    def num_classes(self) -> int:
        """By the names, else by the classifier, else by the denoiser."""
        if self.id2label is not None:
            return len(self.id2label)
        if self.classifier is not None:
            return int(self.classifier.config.num_classes)
        return self.class_embeds or 0

    @property
    def null_label(self) -> int | None:
        """What stands for no class, if the UNet was taught that."""
        return self.num_classes if self.class_embeds == self.num_classes + 1 else None

    def check_classes(self) -> None:
        """Raises ValueError if UNet, classifier and names are not of the same classes, or not of the same latents."""
        names, known = self.id2label, self.num_classes
        if names is not None and sorted(names) != list(range(known)):
            raise ValueError(f"id2label must name the classes from 0 to {known - 1}, not {sorted(names)[:5]}...")
        embeds = self.class_embeds
        if embeds is None and self.classifier is None:
            raise ValueError(
                "this UNet has no class embeddings (num_class_embeds) and there is no classifier, so nothing could be "
                "drawn of a class; use UnconditionalPipeline, or give a classifier"
            )
        if embeds not in (None, known, known + 1):
            raise ValueError(
                f"the UNet has num_class_embeds={embeds} and there are {known} classes; it must have as many, or one "
                f"more for no class"
            )
        if self.classifier is None:
            return
        own, channels = self.classifier.config, self.vae.config.latent_channels
        if own.num_classes != known:
            raise ValueError(f"the classifier has num_classes={own.num_classes} and there are {known} classes")
        if own.in_channels != channels:
            where = "pixels" if self.vqvae is None else "latents"
            raise ValueError(
                f"the classifier takes {own.in_channels} channels and the {where} have {channels}; it is of another "
                f"model"
            )

    def label_numbers(self, class_labels: Label | Sequence[Label]) -> list[int]:
        """Numbers of classes, from numbers or names.

        Raises:
            TypeError: neither names nor whole numbers.
            ValueError: there is no such class, or several have that name, or none is given.
        """
        given: Any = class_labels if are_several(class_labels) else [class_labels]
        each = [label for one in given for label in (one if are_several(one) else [one])]  # as diffusers takes them
        numbers = [class_number(label, self.id2label or {}, self.num_classes) for label in each]
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
        classifier_scale: float = 1.0,
        num_images_per_class: int = 1,
        height: int | None = None,
        width: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | Sequence[int] | None = None,
        **extras: Unpack[Extras],
    ) -> Steps[ImagesOutput | tuple[Any, Any]]:
        """Draw. There are B images: for each class in turn, ``num_images_per_class``.

        Args:
            class_labels: numbers or names of classes.
            guidance_scale: of classifier-free guidance; up to 1 there is none. By default the model's.
            classifier_scale: of the classifier's gradient, the paper's s, if there is a classifier; 0: it is not asked.
                It acts at every noise level, also outside ``guidance_interval``.
            height, width: in pixels; by default what the model was trained on.
            extras: ``guidance_interval``, ``variation_seed`` and ``variation_strength``.
            num_inference_steps: and ``timesteps``, ``sigmas``, ``eta``, ``guidance_rescale``, ``generator``,
                ``latents``, ``output_type``, ``return_dict``, ``callback_on_step_end``, ``seed``, as of
                ``TextToImagePipeline``.

        Raises:
            TypeError, ValueError: a value does not fit; the message says which and why.
        """
        options = ClassOptions.of(locals())
        numbers = self.label_numbers(class_labels)
        if options.classifier_scale < 0:
            raise ValueError(f"classifier_scale must be a number from 0, not {classifier_scale}")
        self.check_classes()  # components can be replaced
        self.check_channels(0, "UNets of super-resolution and the like cannot draw from noise alone")
        call = Call(self, options, len(numbers), options.num_images_per_class or 1)
        labels = torch.tensor(numbers, device=call.device).repeat_interleave(call.per_item)
        latents = call.first_latents(call.latents_shape(*self.picture_size(options.height, options.width)))
        schedule = call.timesteps()
        towards = None
        if self.classifier is not None and options.classifier_scale > 0:
            towards = ClassifierGuidance(self.classifier, labels, options.classifier_scale, call.sampler)
        change = None if towards is None else towards.change_prediction
        denoiser = call.denoiser(self.condition(labels, call.guidance), change=change)
        return (yield from call.draw(denoiser, latents, schedule, None if towards is None else towards.change_step))

    def condition(self, labels: Tensor, guidance: ClassifierFreeGuidance) -> GuidedConditioning:
        """What the UNet receives of classes (B,): they, and with guidance what stands for no class; or nothing.

        Raises:
            ValueError: there is guidance between classes and none, for which the UNet was not trained.
        """
        if guidance.active:
            if self.null_label is None:
                raise ValueError(
                    f"guidance_scale={guidance.scale} needs a UNet that was trained to do without a class (with "
                    f"num_class_embeds={self.num_classes + 1}); this one has {self.class_embeds}. "
                    f"Leave it at 1, or guide by a classifier"
                )
            no_class = torch.full_like(labels, self.null_label)
            return GuidedConditioning(Conditioning(labels=labels), Conditioning(labels=no_class))
        return GuidedConditioning(Conditioning(labels=None if self.class_embeds is None else labels))


def class_number(label: Any, names: Mapping[int, str], count: int) -> int:
    """Which of `count` classes a number or a name means; `names` by number, none where they are only numbered.

    A class can have several names, with commas between them, as ImageNet's have. A whole name comes before one of
    several, and one that is written alike before one that is not. Digits that are no name are a number.

    Raises:
        TypeError: neither a name nor a whole number.
        ValueError: there is no such class, or several have that name.
    """
    if not isinstance(label, str):
        number = whole_number(label, "a class")
        if not 0 <= number < count:
            raise ValueError(f"there is no class {number}; they are numbered from 0 to {count - 1}")
        return number
    wanted = label.strip()
    ways: list[Callable[[str], bool]] = [
        lambda own: own == wanted,
        lambda own: own.strip().lower() == wanted.lower(),
        lambda own: wanted.lower() in [name.strip().lower() for name in own.split(",")],
    ]
    for has in ways:
        found = [number for number, own in names.items() if has(own)]
        if len(found) > 1:
            which = ", ".join(f"{number} ({names[number]})" for number in found[:SHOWN])
            raise ValueError(f"{label!r} is a name of several classes: {which}; give the number")
        if found:
            return found[0]
    if wanted.isascii() and wanted.isdecimal():
        return class_number(int(wanted), names, count)
    raise ValueError(
        f"there is no class {label!r}; {other_classes(wanted, names.values()) if names else 'give a number'}"
    )


@dataclass
class ClassifierGuidance:
    """Steps towards a class along a classifier's gradient. ADM (Dhariwal & Nichol 2021), Sec. 4.

    With a DDPM scheduler the mean of every step is shifted by ``scale`` times the variance times the gradient (Alg. 1),
    with any other the predicted noise (Alg. 2).

    Args:
        classifier: a ``NoisyClassifier``.
        class_labels: (B,) long.
        scale: the paper's s.
        sampler: of the call.
    """

    classifier: Any
    class_labels: Tensor
    scale: float
    sampler: Sampler

    @property
    def shifts_means(self) -> bool:
        return type(self.sampler.scheduler).__name__ in MEANS

    def gradient(self, x: Tensor, timestep: Any) -> Tensor:
        """`scale` times that of log p(class | x), (B, C, h, w) float32."""
        x = x.to(self.classifier.dtype)
        return self.scale * self.classifier.log_probability_gradient(x, timestep, self.class_labels).float()

    def change_prediction(self, prediction: Tensor, x: Tensor, timestep: Any) -> Tensor:
        """Alg. 2: a prediction whose noise is less by sqrt(1 - alpha-bar) times the gradient.

        Args:
            prediction: (B, C, h, w), or twice the channels with learned variances, which stay.
            x: what the network saw, (B, C, h, w).
        """
        if self.shifts_means:
            return prediction
        return self.sampler.process.with_gradient(prediction, x, timestep, self.gradient(x, timestep))

    def change_step(self, progress: Progress) -> Tensor:
        """Alg. 1: the latents after a step, (B, C, h, w), moved by variance times gradient, but for the last step."""
        timestep, latents = progress.timestep, progress.latents
        if not self.shifts_means or int(timestep) == 0:
            return latents
        before = int(self.sampler.scheduler.previous_timestep(timestep))
        variance = self.sampler.process.step_variance(int(timestep), before, progress.prediction)
        return latents + (variance * self.gradient(progress.scaled, timestep)).to(latents.dtype)
