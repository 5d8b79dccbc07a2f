"""``latentdiff settings``."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast

import typer

from latentdiff.terminal import say

if TYPE_CHECKING:
    from latentdiff.training.settings import Settings

Kind = StrEnum("Kind", ["autoencoder", "denoiser", "classifier", "prior", "finetune", "distill", "doctor"])


def settings_of(command: str) -> "type[Settings]":
    """The settings of a command, by its own name."""
    from latentdiff.training import settings as kinds

    stem = "Distillation" if command == Kind.distill else command.capitalize()
    return cast("type[Settings]", getattr(kinds, f"{stem}Settings"))


def full_name(command: Kind) -> str:
    """As it is typed after ``latentdiff``."""
    return (
        f"train {command}"
        if command in (Kind.autoencoder, Kind.denoiser, Kind.classifier, Kind.prior)
        else str(command)
    )


def settings(
    command: Annotated[
        Kind | None, typer.Argument(metavar="COMMAND", help=f"One of {', '.join(Kind)}.", show_default=False)
    ] = None,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Of these, also when to change them.")
    ] = None,
) -> None:
    """Show all settings of a command as a YAML file: what each means, its type and default.

    latentdiff settings finetune > mine.yaml
    latentdiff settings finetune rank learning_rate   (of these two, also when to change them)
    """
    if command is None:
        say("Say of which command:")
        for kind in Kind:
            say(f"  latentdiff settings {kind.value:<12}  of 'latentdiff {full_name(kind)}'")
        return
    from latentdiff.training.settings.describe import as_yaml, in_full

    if names:
        typer.echo(in_full(settings_of(command), names), nl=False)
        return
    title = f"Settings of 'latentdiff {full_name(command)}', with their defaults."
    typer.echo(as_yaml(settings_of(command), title), nl=False)
