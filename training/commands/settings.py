"""``latentdiff settings``."""

from enum import StrEnum
from typing import Annotated

import typer

Kind = StrEnum("Kind", ["autoencoder", "denoiser", "classifier", "finetune", "distill", "doctor"])


def settings(
    command: Annotated[Kind, typer.Argument(metavar="COMMAND", help=f"One of {', '.join(Kind)}.")],
) -> None:
    """Show all settings of a command as a YAML file: what each means, its type and default.

    latentdiff settings finetune > mine.yaml
    """
    from latentdiff.training import settings as kinds
    from latentdiff.training.settings.describe import as_yaml

    stem = "Distillation" if command is Kind.distill else command.value.capitalize()
    kind = getattr(kinds, f"{stem}Settings")
    of_train = command in (Kind.autoencoder, Kind.denoiser, Kind.classifier)
    name = f"train {command.value}" if of_train else command.value
    typer.echo(as_yaml(kind, f"Settings of 'latentdiff {name}', with their defaults."), nl=False)
