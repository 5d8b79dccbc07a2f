"""Pictures of a class: under classifier guidance, classifier-free guidance, or both."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import diffusers
import torch
from torch import Generator, Tensor

from latentdiff.models import NoisyClassifier, UNet2DModel
from latentdiff.pipelines import steps
from latentdiff.pipelines.base import AnyAutoencoder, StepCallback, check_count
from latentdiff.pipelines.class_guidance import ClassDenoiser, ClassifierGuidance
from latentdiff.pipelines.drawing import Extras, ImagesOutput, Steps, whole
from latentdiff.pipelines.unconditional import TextlessPipeline

Label = int | str


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
    def num_classes(self) -> int:
        """By the names, else by the classifier, else by the UNet."""
        if self.id2label is not None:
            return len(self.id2label)
        if self.classifier is not None:
            return int(self.classifier.config.num_classes)
        return int(self.unet.config.num_class_embeds or 0)

    @property
    def null_label(self) -> int | None:
        """What stands for no class, if the UNet was taught that."""
        return self.num_classes if self.unet.config.num_class_embeds == self.num_classes + 1 else None

    def check_classes(self) -> None:
        """Raises ValueError if UNet, classifier and names are not of the same classes, or not of the same latents."""
        names, known = self.id2label, self.num_classes
        if names is not None and sorted(names) != list(range(known)):
            raise ValueError(f"id2label must name the classes from 0 to {known - 1}, not {sorted(names)[:5]}...")
        embeds = self.unet.config.num_class_embeds
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
            ValueError: there is no such class, or none is given.
        """
        given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        if not given:
            raise ValueError("class_labels is empty; give one class or more")
        numbers = {
            name.strip().lower(): i for i, names in (self.id2label or {}).items() for name in (names, *names.split(","))
        }
        return [self._number(label, numbers) for label in given]

    def _number(self, label: Label, numbers: Mapping[str, int]) -> int:
        if isinstance(label, str):
            number = numbers.get(label.strip().lower())
            if number is None:
                names = list((self.id2label or {}).values())
                known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
                raise ValueError(f"there is no class {label!r}; {f'there are {known}' if names else 'give a number'}")
            return number
        if isinstance(label, bool) or not 0 <= int(label) < self.num_classes:
            raise ValueError(f"there is no class {label!r}; they are numbered from 0 to {self.num_classes - 1}")
        return int(label)

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
            guidance_scale: of classifier-free guidance; up to 1 the class is merely told. By default the model's.
            classifier_scale: of the classifier's gradient, the paper's s, if there is a classifier; 0: it is not asked.
                It acts at every noise level, also outside ``guidance_interval``.
            height, width: in pixels; by default what the model was trained on.
            extras: ``guidance_interval``, ``variation_seed`` and ``variation_strength``.
            num_inference_steps, timesteps, sigmas, eta, guidance_rescale, generator, latents, output_type,
                return_dict, callback_on_step_end, seed: as of ``TextToImagePipeline``.

        Raises:
            TypeError, ValueError: a value does not fit; the message says which and why.
        """
        numbers = self.label_numbers(class_labels)
        per_class = check_count(num_images_per_class, "num_images_per_class")
        if not 0 <= classifier_scale < float("inf"):
            raise ValueError(f"classifier_scale must be a number from 0, not {classifier_scale}")
        self.check_classes()  # components can be replaced
        drawing = self.begin(len(numbers) * per_class, seed, generator, output_type, return_dict, extras)
        interval = extras.get("guidance_interval")
        self.set_guidance(guidance_scale, guidance_rescale, interval, len(numbers), per_class)
        labels = torch.tensor(numbers, device=self._execution_device).repeat_interleave(per_class)
        shape = self.latents_shape(drawing.count, *self.picture_size(height, width))
        schedule, _ = self.plan_steps(num_inference_steps, timesteps, sigmas)
        towards = None
        if self.classifier is not None and classifier_scale > 0:
            towards = ClassifierGuidance(self.classifier, labels, float(classifier_scale), self.scheduler)
        result = yield from self.run_steps(
            ClassDenoiser(self.unet, self.guidance, self.told_labels(labels), towards),
            self.first_latents(drawing, shape, latents),
            schedule,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            towards.shifted_step if towards is not None and towards.shifts_means else None,
            **steps.step_options(self.scheduler, drawing.noise.generator, eta),
        )
        return self.finish(drawing, result)

    def told_labels(self, labels: Tensor) -> Tensor | None:
        """What the UNet is told of classes (B,): they, or after as many that stand for no class, or nothing.

        Raises:
            ValueError: there is guidance between classes and none, which the UNet was not taught.
        """
        if self.do_classifier_free_guidance:
            if self.null_label is None:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale} needs a UNet that was taught to do without a class (with "
                    f"num_class_embeds={self.num_classes + 1}); this one has {self.unet.config.num_class_embeds}. "
                    f"Leave it at 1, or guide by a classifier"
                )
            return torch.cat([torch.full_like(labels, self.null_label), labels])
        return None if self.unet.config.num_class_embeds is None else labels
