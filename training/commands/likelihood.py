"""``latentdiff likelihood``."""

import typer

from latentdiff.pipelines.commands.options import Device, DeviceOption, Precision, PrecisionOption, pick_device
from latentdiff.training.commands.options import show_progress, takes_settings
from latentdiff.training.settings.evaluation import LikelihoodSettings


@takes_settings(LikelihoodSettings, argument="model")
def likelihood(
    settings: LikelihoodSettings,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
) -> None:
    """Measure the variational bound of held-out pictures, in bits per dimension: lower is better.

    latentdiff likelihood runs/mine --data pictures --steps 25
    """
    import torch

    from latentdiff.training.evaluation.likelihood import evaluate_likelihood
    from latentdiff.training.evaluation.textless import load_textless

    show_progress()
    folder = settings.folder()
    pipeline = load_textless(settings.model, getattr(torch, precision.value)).to(pick_device(device))
    evaluate_likelihood(pipeline, settings)
    typer.echo(f"The figures are in {folder / 'likelihood.json'}")
