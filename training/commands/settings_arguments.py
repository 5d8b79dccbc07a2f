"""What the training commands share on the command line."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from latentdiff.pipelines.commands.model_options import be_quiet
from latentdiff.terminal import say
from latentdiff.training.settings import RunSettings, Settings

SettingsT = TypeVar("SettingsT", bound=Settings)
RunT = TypeVar("RunT", bound=RunSettings)

Data = Annotated[
    str | None,
    typer.Option(help="Folder with metadata.jsonl/.csv/.parquet or .txt captions, *.tar shards, or a dataset's name."),
]
Output = Annotated[Path | None, typer.Option(help="Folder for the model; its training/ keeps checkpoints and samples.")]
Config = Annotated[
    Path | None, typer.Option(help="YAML file of settings; data and output may be in it.", exists=True, dir_okay=False)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Begin, say what time, memory and disk it would take, and write nothing in OUTPUT."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, over the file's; 'latentdiff settings' shows them."),
]


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """``key=value`` arguments as a dictionary.

    Raises:
        ValueError: an argument without ``=``, or a key given twice.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"{argument!r}: settings are written key=value")
        if key in values:
            raise ValueError(f"setting {key!r} is given twice")
        values[key] = value
    return values


def load_settings(
    kind: type[SettingsT], file: str | Path | None, overrides: list[str] | None, **options: str | Path | None
) -> SettingsT:
    """Settings from a YAML file, ``key=value`` arguments, and those that have options of their own (None: not given).

    Raises:
        ValueError: a setting is given twice, or see `Settings.load`.
    """
    given: dict[str, Any] = dict(parse_overrides(overrides or []))
    for key, value in options.items():
        if value is not None and key in given:
            raise ValueError(f"setting {key!r} is given twice")
        given.setdefault(key, str(value) if isinstance(value, Path) else value)
    return kind.load(file, given)


def show_progress() -> None:
    """Show the package's messages, of one process if there are several, and its own progress bars only."""
    be_quiet()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if is_first_process():
        logging.getLogger("latentdiff").setLevel(logging.INFO)


def train_and_say(what: str, train: Callable[[RunT], Path], settings: RunT, dry: bool) -> None:
    """Train, or only begin and say what it would take.

    At the end one process says where the result, a `what`, is; a run that has stopped before has said that.
    """
    from latentdiff.training.loop.checkpoints import step_reached
    from latentdiff.training.loop.estimate import dry_run

    if dry:
        dry_run(train, settings)
        if is_first_process():
            say(
                f"Nothing was written in {settings.output}. There would be the {what}, its README.md, and in training/ "
                f"checkpoints, samples, curves.png, metrics.jsonl and settings.yaml"
            )
        return
    output = train(settings)
    if is_first_process() and step_reached(output) >= settings.max_steps:
        say(f"The {what} is in {output}")


def is_first_process() -> bool:
    """By the environment of torchrun and `accelerate launch`; valid before and after processes have started."""
    return os.environ.get("RANK", "0") == "0"
