"""Training a classifier of noisy pictures, to guide a model that is there already. ADM (Dhariwal & Nichol 2021)."""

from pathlib import Path

from accelerate.utils import set_seed

from latentdiff.codec import Codec
from latentdiff.conditioning import other_classes
from latentdiff.diffusion.process import process_from_config
from latentdiff.pipelines import ClassConditionalPipeline
from latentdiff.training.card.kinds import class_conditional_kind
from latentdiff.training.data.caption_checks import class_names
from latentdiff.training.evaluation.held_out import load_textless
from latentdiff.training.loop.output_folder import open_output
from latentdiff.training.objectives.diffusion import ClassifierObjective
from latentdiff.training.settings import ClassifierSettings
from latentdiff.training.starting_networks import build_classifier, freeze
from latentdiff.training.trainers.diffusion import load_data, train_diffusion
from latentdiff.training.trainers.diffusion_models import GuidedModel


def train_classifier(settings: ClassifierSettings) -> Path:
    """Train a classifier, or go on with a run that `settings.output` holds; returns the folder of model and classifier.

    Raises:
        ValueError, FileNotFoundError: settings, pictures or a model that cannot be trained for, and what to do.
    """
    if Path(settings.output).resolve() == Path(settings.model).resolve():
        raise ValueError(f"{settings.output} is the model to be guided, which is not changed; choose another --output")
    open_output(settings, unsettled=settings.unsettled)
    model = load_textless(settings.model)
    if settings.resolution == 0:
        settings = settings.completed(resolution=model.picture_size(None, None)[0])
    if settings.resolution % model.vae_scale_factor:
        raise ValueError(
            f"resolution {settings.resolution} is not divisible by the autoencoder's factor {model.vae_scale_factor}"
        )
    process, codec = process_from_config(model.scheduler.config), Codec(model.vae)
    freeze(model.unet, model.vae)
    open_output(settings)
    data = load_data(settings, "class")
    classes = class_names(data.pictures)
    known = model.id2label if isinstance(model, ClassConditionalPipeline) else None
    if known is not None:
        new = sorted(set(classes) - set(known.values()))
        if new:
            raise ValueError(f"{settings.model} knows no class {new[0]!r}; {other_classes(new[0], known.values())}")
        classes = [known[i] for i in range(len(known))]
    set_seed(settings.seed)
    classifier = build_classifier(settings, codec, len(classes))
    if settings.gradient_checkpointing:
        classifier.enable_gradient_checkpointing()
    trained = GuidedModel(codec, classifier, model.scheduler, process, classes, model)

    def save() -> None:
        pipeline = trained.pipeline()
        pipeline.register_defaults(**model.registered_defaults)
        pipeline.save_pretrained(settings.output)

    kind = class_conditional_kind(classes, classifier=True)
    return train_diffusion(settings, trained, data, ClassifierObjective(classifier, process), save, kind)
