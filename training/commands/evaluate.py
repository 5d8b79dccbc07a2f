"""``latentdiff evaluate``."""

import typer

from latentdiff.pipelines.commands.options import (
    Device,
    DeviceOption,
    Precision,
    PrecisionOption,
    find_place,
    load_pipeline,
)
from latentdiff.pipelines.registry import kind_in
from latentdiff.training.commands.options import show_progress, takes_settings
from latentdiff.training.settings.evaluation import EvaluationSettings


@takes_settings(EvaluationSettings, argument="model")
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
    from latentdiff.interchange.folders import find_model

    local = find_model(settings.model)  # a missing model is reported before torch is loaded
    show_progress()
    from latentdiff.training.evaluation.evaluate import evaluate_pipeline
    from latentdiff.training.evaluation.textless import textless_kind

    folder = settings.folder()
    kind = (local and textless_kind(settings.model)) or kind_in(local or find_place(settings.model)).name
    pipeline = load_pipeline(settings.model, device, precision, None, kind)
    pipeline.set_progress_bar_config(disable=True)
    evaluate_pipeline(pipeline, settings)
    typer.echo(f"The figures are in {folder / 'evaluation.json'}")
