"""``latentdiff evaluate`` and ``latentdiff likelihood``."""

from functools import partial

from latentdiff.pipelines.commands.model_options import (
    Device,
    DeviceOption,
    Precision,
    PrecisionOption,
    grouped,
    load_pipeline,
    pick_device,
)
from latentdiff.pipelines.registry import kind_in
from latentdiff.pipelines.storage.places import find_place, local_place
from latentdiff.terminal import say
from latentdiff.training.commands.settings_arguments import begin
from latentdiff.training.settings import EvaluationSettings, LikelihoodSettings


@partial(grouped, argument="model")
def evaluate(
    settings: EvaluationSettings,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
) -> None:
    """Measure a model: draw from the captions of held-out pictures, and compare.

    latentdiff evaluate runs/mine --data pictures

    Pictures that were drawn already are kept, so a repeated command goes on where it stopped. The figures are shown,
    written to evaluation.json, and put into the model's card.
    """
    from latentdiff.interchange.folders import check_clip_source

    folder = settings.folder()  # what is missing is reported before torch is loaded
    local_place(settings.model)
    check_clip_source(settings.clip)
    begin(settings)
    from latentdiff.training.evaluation.evaluate import evaluate_pipeline

    place = find_place(settings.model)
    pipeline = load_pipeline(place, device, precision, None, kind_in(place, textless=True).name)
    pipeline.set_progress_bar_config(disable=True)
    evaluate_pipeline(pipeline, settings)
    say(f"The figures are in {folder / 'evaluation.json'}")


@partial(grouped, argument="model")
def likelihood(
    settings: LikelihoodSettings,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
) -> None:
    """Measure the likelihood of held-out pictures, or its bound, in bits per dimension: lower is better.

    latentdiff likelihood runs/mine --data pictures --steps 25
    """
    folder = settings.folder()
    begin(settings)
    import torch

    from latentdiff.training.evaluation.held_out import load_textless
    from latentdiff.training.evaluation.likelihood import evaluate_likelihood

    pipeline = load_textless(settings.model, getattr(torch, precision.value)).to(pick_device(device))
    evaluate_likelihood(pipeline, settings)
    say(f"The figures are in {folder / 'likelihood.json'}")
