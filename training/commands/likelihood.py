"""``latentdiff likelihood``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.pipelines.commands.options import Device, DeviceOption, Precision, PrecisionOption, pick_device
from latentdiff.training.commands.options import HeldOutSplit, ImageColumn, show_progress


class Variance(StrEnum):
    """Of the reverse steps."""

    learned_range = "learned_range"
    fixed_small = "fixed_small"
    fixed_large = "fixed_large"


def likelihood(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model without text.")],
    data: Annotated[str, typer.Option(help="Folder of pictures, *.tar shards, or a dataset's name.")],
    split: HeldOutSplit = "validation",
    steps: Annotated[
        str | None,
        typer.Option(help="Of the process: 25, or by sections 10,10,5, or ddim25. By default all, which is slow."),
    ] = None,
    variance: Annotated[Variance | None, typer.Option(help="Of the reverse steps; by default the model's.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Measure on the first so many pictures.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture i has the noise of SEED + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once; changes memory and speed only.")] = 32,
    output: Annotated[
        Path | None, typer.Option(help="Folder for likelihood.json; by default MODEL/evaluation.")
    ] = None,
    image_column: ImageColumn = "image",
    caption_column: Annotated[str, typer.Option(help="Of a dataset or table: the class, if the model knows any.")] = (
        "text"
    ),
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
) -> None:
    """Measure the variational bound of held-out pictures, in bits per dimension: lower is better.

    latentdiff likelihood runs/mine --data pictures --steps 25
    """
    import torch

    from latentdiff.training.evaluation.likelihood import LikelihoodSettings, evaluate_likelihood
    from latentdiff.training.evaluation.textless import load_textless

    show_progress()
    settings = LikelihoodSettings(
        model=model,
        data=data,
        split=split,
        steps=steps,
        variance=variance.value if variance is not None else None,
        count=count,
        seed=seed,
        batch_size=batch_size,
        output=str(output) if output is not None else None,
        image_column=image_column,
        caption_column=caption_column,
    )
    folder = settings.folder()
    pipeline = load_textless(model, getattr(torch, precision.value)).to(pick_device(device))
    evaluate_likelihood(pipeline, settings)
    typer.echo(f"The figures are in {folder / 'likelihood.json'}")
