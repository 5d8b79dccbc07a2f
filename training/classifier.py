"""Training a classifier of noisy pictures, to guide a model that is there already. ADM (Dhariwal & Nichol 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn

from latentdiff.diffusion import GaussianDiffusion
from latentdiff.models import NoisyClassifier
from latentdiff.pipelines import ClassConditionalPipeline
from latentdiff.training.config import ClassifierSettings, DiffusionSettings
from latentdiff.training.describe import describe
from latentdiff.training.diffusion_run import load_data, train_diffusion
from latentdiff.training.inputs import frozen
from latentdiff.training.run import TrainingRun
from latentdiff.training.textless import ClassLabels, TextlessParts, class_names, load_textless


class ClassifierObjective(nn.Module):
    """Cross-entropy of the class, of pictures with as much noise as the process mixes into them. ADM, Sec. 4.3.

    Args:
        classifier: called with (noisy latents, timesteps).
        process: that of the model to be guided.
    """

    def __init__(self, classifier: nn.Module, process: GaussianDiffusion) -> None:
        super().__init__()
        self.classifier, self.process = classifier, process

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        class_labels: Tensor,
        loss_weight: Tensor | None = None,
        timestep_draws: Tensor | None = None,
        *,
        held_out: bool = False,
    ) -> Tensor:
        """The mean over B, in nats. Arguments as of `DenoiserObjective`.

        If `held_out`: without weights, (2, B) of each picture, and whether its class was found.
        """
        logits = self.classifier(self.process.q_sample(latents, timesteps, noise), timesteps)
        losses = F.cross_entropy(logits.float(), class_labels, reduction="none")
        if held_out:
            return torch.stack([losses, (logits.argmax(1) == class_labels).to(losses)])
        return (losses if loss_weight is None else losses * loss_weight).mean()


@dataclass
class GuidedParts(TextlessParts):
    """A model, and as ``unet`` the classifier that is trained for it."""

    model: Any = None
    held_out_figures: ClassVar[tuple[str, ...]] = ("val_loss", "val_accuracy")

    def pipeline(self) -> ClassConditionalPipeline:
        model, names = self.model, dict(enumerate(self.classes))
        return ClassConditionalPipeline(model.unet, self.scheduler, model.vqvae, self.unet, id2label=names)

    def draw(self, prompts: list[str], settings: DiffusionSettings, device: torch.device) -> list[Any]:
        assert isinstance(settings, ClassifierSettings)
        scales = {
            "guidance_scale": settings.sample_guidance_scale,
            "classifier_scale": settings.sample_classifier_scale,
        }
        return self._pictures(device, settings, prompts, **scales)


def train_classifier(settings: ClassifierSettings) -> Path:
    """Train a classifier, or go on with a run that `settings.output` holds; returns the folder of model and classifier.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or a model that cannot be trained for, and what to do.
    """
    model = load_textless(settings.model)
    if Path(settings.output).resolve() == Path(settings.model).resolve():
        raise ValueError(f"{settings.output} is the model to be guided, which is not changed; choose another --output")
    if settings.resolution == 0:
        settings = settings.model_copy(update={"resolution": model.picture_size(None, None)[0]})
    if settings.resolution % model.vae_scale_factor:
        raise ValueError(
            f"resolution {settings.resolution} is not divisible by the autoencoder's factor {model.vae_scale_factor}"
        )
    process = GaussianDiffusion.from_scheduler_config(model.scheduler.config)
    frozen(model.unet, model.vae)
    data = load_data(settings, "class")
    classes = class_names(data.pictures)
    known: Mapping[int, str] | None = getattr(model, "id2label", None)
    if known is not None:
        new = sorted(set(classes) - set(known.values()))
        if new:
            raise ValueError(f"{settings.model} knows no class {new[0]!r}; its classes: {', '.join(known.values())}")
        classes = [known[i] for i in range(len(known))]
    set_seed(settings.seed)
    classifier = build_classifier(settings, model, len(classes))
    if settings.gradient_checkpointing:
        classifier.enable_gradient_checkpointing()
    labels = ClassLabels({name: i for i, name in enumerate(classes)})
    parts = GuidedParts(model.vae, None, None, classifier, model.scheduler, process, labels, classes, model)

    def finish(run: TrainingRun) -> None:
        pipeline = parts.pipeline()
        pipeline.register_defaults(**model.registered_defaults)
        pipeline.save_pretrained(settings.output)
        describe(run, settings, "class-conditional image pipeline with a classifier", len(data.pictures))

    return train_diffusion(settings, parts, data, ClassifierObjective(classifier, process), finish)


def build_classifier(settings: ClassifierSettings, model: Any, classes: int) -> NoisyClassifier:
    """A new classifier of what `model` denoises."""
    down = ["AttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" for attends in settings.attention_levels]
    return NoisyClassifier(
        sample_size=settings.resolution // model.vae_scale_factor,
        in_channels=model.vae.config.latent_channels,
        num_classes=classes,
        down_block_types=tuple(down),
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        attention_head_dim=settings.attention_head_dim,
        norm_num_groups=settings.norm_num_groups,
        attn_norm_num_groups=settings.norm_num_groups,
        dropout=settings.dropout,
        pool=settings.pool,
    )
