"""``latentdiff finetune``."""

from enum import StrEnum
from typing import Annotated

import typer

from latentdiff.training.commands.options import (
    Config,
    Data,
    Output,
    Overrides,
    announce,
    parse_overrides,
    show_progress,
)


class Method(StrEnum):
    """What is trained."""

    full = "full"
    lora = "lora"
    dreambooth = "dreambooth"
    textual_inversion = "textual-inversion"


def finetune(
    data: Data,
    output: Output,
    model: Annotated[
        str | None, typer.Option(help="A packaged model (emoji is the default), a pipeline folder, or owner/name.")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="All weights, a LoRA (the default), one subject, or a new word.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Fine-tune a model on your own pictures; OUTPUT becomes a pipeline folder that draws.

    latentdiff finetune --data pictures --output runs/mine max_steps=400

    Repeat the command to go on where it stopped.
    """
    from latentdiff.training.settings import FinetuneSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data, "output": str(output)}
    chosen = {"model": model, "method": method.value if method else None}
    for key, value in chosen.items():
        if value is not None and key in given:
            raise ValueError(f"setting {key!r} is given twice")
    settings = FinetuneSettings.load(config, {**given, **{k: v for k, v in chosen.items() if v is not None}})
    show_progress()
    from latentdiff.training.trainers.finetune import finetune as train

    announce(f"The pipeline is in {train(settings)}")
