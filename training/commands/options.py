"""What the training commands share on the command line."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    str,
    typer.Option(help="Folder with metadata.jsonl/.csv/.parquet or .txt captions, *.tar shards, or a dataset's name."),
]
Output = Annotated[Path, typer.Option(help="Folder for the model; its training/ keeps checkpoints and samples.")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings.", exists=True, dir_okay=False)]
HeldOutSplit = Annotated[str, typer.Option(help="Which of its pictures; best those the model was not trained on.")]
ImageColumn = Annotated[str, typer.Option(help="Of a dataset.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, over the file's.")]


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


def show_progress() -> None:
    """Let the package's messages be seen, those of one process if there are several, and our progress bars only."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if is_first_process():
        logging.getLogger("latentdiff").setLevel(logging.INFO)


def announce(result: str) -> None:
    """Say what came out, once."""
    if is_first_process():
        typer.echo(result)


def is_first_process() -> bool:
    """By what torchrun and `accelerate launch` tell; to be asked before and after there are processes."""
    return os.environ.get("RANK", "0") == "0"
