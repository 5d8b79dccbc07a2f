"""The kinds of diffusion model in training: their networks, what they are conditioned on, and how they draw."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from latentdiff.codec import Codec
from latentdiff.conditioning import Conditioning, NoConditioner
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.pipelines import (
    ClassConditionalPipeline,
    DiTPipeline,
    PixArtTextToImagePipeline,
    TextToImagePipeline,
    UnconditionalPipeline,
)
from latentdiff.pipelines.distributed import processes
from latentdiff.text.masked import MaskedTextConditioner
from latentdiff.training.batch.cache import digest
from latentdiff.training.batch.conditions import (
    ConditionSource,
    class_source,
    text_source,
    token_source,
    with_sizes,
)
from latentdiff.training.batch.latents import latents_digest
from latentdiff.training.batch.two_encoders import caption_conditioner, joint_source, joint_token_source
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.loop.distributed import spread_modules
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.diffusion import TwoTextEncoders
from latentdiff.training.settings import ClassifierSettings, DiffusionSettings

SAMPLES = 16  # pictures of a grid of samples, at most


@dataclass
class DiffusionModel(ABC):
    """A model in training.

    Args:
        codec: a frozen autoencoder.
        network: that is trained: a denoiser, or a classifier.
        scheduler: that pipelines draw with.
        process: that the scheduler samples from, or what else says which times there are.
        teacher_digest: of the network that a student in distillation learns from.

    Attributes:
        warned_of: by the pipelines of these networks, of which there is one for each grid of samples.
    """

    codec: Codec
    network: Any
    scheduler: Any
    process: Any
    teacher_digest: str = field(default="", kw_only=True)
    warned_of: set[Hashable] = field(default_factory=set, init=False)

    @property
    def saved_autoencoder(self) -> Any:
        """What pipelines without text keep; None: they draw pixels."""
        return None if self.codec.is_identity else self.codec.autoencoder

    def given(self) -> dict[str, str]:
        """Digests of what is not trained, by name."""
        teacher = {"teacher": self.teacher_digest} if self.teacher_digest else {}
        return {"autoencoder": latents_digest(self.codec), **digest_of_frozen("denoiser", self.network), **teacher}

    @abstractmethod
    def pipeline(self) -> Any:
        """A pipeline of these very networks."""

    @abstractmethod
    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        """What the network is given of the captions of `pictures`."""

    def draw(
        self, prompts: Sequence[str], settings: DiffusionSettings, device: torch.device, seed: int = 0
    ) -> list[Any]:
        """A picture of each prompt, the first with `seed`, the next with the next."""
        scale = settings.sample_guidance_scale
        return self._pictures(device, settings, list(prompts), guidance_scale=scale, seed=seed)

    def steps(self, settings: DiffusionSettings) -> int | None:
        """In which samples are drawn; None: as many as the pipeline takes by itself."""
        return settings.sample_steps

    def _pictures(self, device: torch.device, settings: DiffusionSettings, *args: Any, **call: Any) -> list[Any]:
        pipeline = self.pipeline()
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and not spread_modules(part):  # those, `to` would spread again
                part.to(device)
        pipeline.warned_of = self.warned_of
        quiet = None if processes().is_main_process else True  # None: where nobody looks on
        pipeline.set_progress_bar_config(disable=quiet, desc="drawing samples", leave=False, dynamic_ncols=True)
        size = {"height": settings.resolution, "width": settings.resolution}
        return pipeline(*args, **size, num_inference_steps=self.steps(settings), **call).images


@dataclass
class TextModel(DiffusionModel):
    """A denoiser that is conditioned on text.

    Args:
        prepare_caption: what is done to a caption before it becomes tokens for a text encoder that is trained; None:
            the text encoder is not.
        pipeline_class: what draws with these components.
    """

    tokenizer: Any = None
    text_encoder: Any = None
    prepare_caption: Callable[[str], str] | None = None
    pipeline_class: type[TextToImagePipeline] = TextToImagePipeline

    @property
    def whole_text_encoder(self) -> nn.Module:
        """What reads `Tokens`, where the text is trained."""
        encoder: nn.Module = self.text_encoder
        return encoder

    def given(self) -> dict[str, str]:
        return {**super().given(), **digest_of_frozen("text encoder", self.text_encoder)}

    def pipeline(self) -> TextToImagePipeline:
        return self.pipeline_class(
            self.codec.autoencoder, self.text_encoder, self.tokenizer, self.network, self.scheduler
        )

    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        if self.prepare_caption is not None:
            return token_source(self.tokenizer, self.text_encoder, self.prepare_caption)
        return text_source(run, settings, self.tokenizer, self.text_encoder, pictures)


@dataclass
class SDXLModel(TextModel):
    """A UNet of SDXL, which is given two text encoders' states, a pooled embedding and sizes.

    Args:
        drawn_with: the pipeline with the text encoders.
    """

    drawn_with: Any = None

    @property
    def whole_text_encoder(self) -> nn.Module:
        return TwoTextEncoders(self.text_encoder, self.drawn_with.text_encoder_2)

    def given(self) -> dict[str, str]:
        return {**super().given(), **digest_of_frozen("second text encoder", self.drawn_with.text_encoder_2)}

    def pipeline(self) -> TextToImagePipeline:
        parts = {**self.drawn_with.components, "unet": self.network, "scheduler": self.scheduler}
        zeros = bool(self.drawn_with.config.force_zeros_for_empty_prompt)
        return self.pipeline_class(**parts, force_zeros_for_empty_prompt=zeros)  # type: ignore[call-arg]

    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        conditioner = caption_conditioner(self.drawn_with, run.device)
        if self.prepare_caption is not None:
            return joint_token_source(conditioner)
        return joint_source(run, settings, conditioner, pictures)


@dataclass
class ClassModel(DiffusionModel):
    """A denoiser that is conditioned on classes, which are numbered in the order of their names."""

    classes: Sequence[str] = field(default_factory=list)

    def given(self) -> dict[str, str]:
        return {**super().given(), "list of classes": digest(*self.classes)}

    def pipeline(self) -> ClassConditionalPipeline:
        return ClassConditionalPipeline(
            self.network, self.scheduler, self.saved_autoencoder, id2label=dict(enumerate(self.classes))
        )

    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        return class_source(self.classes, pictures)


@dataclass
class UnconditionalModel(DiffusionModel):
    """A denoiser that is given nothing but noisy latents and the timestep."""

    def pipeline(self) -> UnconditionalPipeline:
        return UnconditionalPipeline(self.network, self.scheduler, self.saved_autoencoder)

    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        return ConditionSource(NoConditioner())

    def draw(
        self, prompts: Sequence[str], settings: DiffusionSettings, device: torch.device, seed: int = 0
    ) -> list[Any]:
        return self._pictures(device, settings, batch_size=SAMPLES, seed=seed)


@dataclass
class PixArtModel(TextModel):
    """A transformer that is conditioned on text, whose padding is hidden from it."""

    def pipeline(self) -> PixArtTextToImagePipeline:
        return PixArtTextToImagePipeline(
            self.tokenizer, self.text_encoder, self.codec.autoencoder, self.network, self.scheduler
        )

    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        source = text_source(run, settings, self.tokenizer, self.text_encoder, pictures, MaskedTextConditioner)
        return replace(source, tells_sizes=True, tell=with_sizes) if self.network.takes_sizes else source


@dataclass
class DiTModel(ClassModel):
    """A transformer that is conditioned on classes."""

    def pipeline(self) -> DiTPipeline:
        return DiTPipeline(self.network, self.codec.autoencoder, self.scheduler, dict(enumerate(self.classes)))

    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        return class_source(self.classes, pictures, self.network.config.num_embeds_ada_norm)


ONE_CLASS = "picture"
"""Of which a transformer draws that was trained without classes, as a ``DiTPipeline`` has some."""


@dataclass
class OneClassModel(UnconditionalModel):
    """A transformer that is given the same class with every picture."""

    def pipeline(self) -> DiTPipeline:
        return DiTPipeline(self.network, self.codec.autoencoder, self.scheduler, {0: ONE_CLASS})

    def conditions(
        self, run: TrainingRun, settings: DiffusionSettings, pictures: Sequence[CaptionedPicture]
    ) -> ConditionSource:
        return ConditionSource(one_class)

    def draw(
        self, prompts: Sequence[str], settings: DiffusionSettings, device: torch.device, seed: int = 0
    ) -> list[Any]:
        return self._pictures(device, settings, [ONE_CLASS] * SAMPLES, guidance_scale=1.0, seed=seed)


def one_class(captions: Sequence[str]) -> Conditioning:
    """The label 0 for each caption."""
    return Conditioning(labels=torch.zeros(len(captions), dtype=torch.long))


@dataclass
class GuidedModel(ClassModel):
    """A classifier of noisy pictures, as `network`, and the pipeline that it will guide."""

    guided: Any = None

    def pipeline(self) -> ClassConditionalPipeline:
        names = dict(enumerate(self.classes))
        return ClassConditionalPipeline(
            self.guided.unet, self.scheduler, self.guided.vqvae, self.network, id2label=names
        )

    def draw(
        self, prompts: Sequence[str], settings: DiffusionSettings, device: torch.device, seed: int = 0
    ) -> list[Any]:
        assert isinstance(settings, ClassifierSettings)
        return self._pictures(
            device,
            settings,
            list(prompts),
            guidance_scale=settings.sample_guidance_scale,
            classifier_scale=settings.sample_classifier_scale,
            seed=seed,
        )


def digest_of_frozen(name: str, network: nn.Module) -> dict[str, str]:
    """A digest of a network's parameters that are not trained, by the network's name, if there are any."""
    frozen = {key: parameter for key, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: weights_digest(frozen)} if frozen else {}
