"""``latentdiff settings``."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from latentdiff.training.settings import Settings

Kind = StrEnum("Kind", ["autoencoder", "denoiser", "classifier", "finetune", "distill", "doctor"])


def settings_of(command: str) -> "type[Settings]":
    """The settings of a command, by its own name."""
    from latentdiff.training import settings as kinds

    stem = "Distillation" if command == Kind.distill else command.capitalize()
    return cast("type[Settings]", getattr(kinds, f"{stem}Settings"))


def settings(
    command: Annotated[Kind, typer.Argument(metavar="COMMAND", help=f"One of {', '.join(Kind)}.")],
) -> None:
    """Show all settings of a command as a YAML file: what each means, its type and default.

    latentdiff settings finetune > mine.yaml
    """
    from latentdiff.training.settings.describe import as_yaml

    of_train = command in (Kind.autoencoder, Kind.denoiser, Kind.classifier)
    name = f"train {command.value}" if of_train else command.value
    typer.echo(as_yaml(settings_of(command), f"Settings of 'latentdiff {name}', with their defaults."), nl=False)
