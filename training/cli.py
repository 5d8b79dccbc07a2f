"""``latentdiff train ...``; the same commands run as ``accelerate launch -m latentdiff.training ...``."""

import logging
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="train",
    no_args_is_help=True,
    help="Train an autoencoder, then a denoiser on its latents. Repeat a command to go on where it stopped.",
)

Data = Annotated[
    str, typer.Option(help="Folder with metadata.jsonl or .txt captions, a `datasets` folder, or a dataset's name.")
]
Output = Annotated[Path, typer.Option(help="Folder for the model; its training/ keeps checkpoints and samples.")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings.", exists=True, dir_okay=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, over the file's.")]


@app.command()
def autoencoder(data: Data, output: Output, config: Config = None, overrides: Overrides = None) -> None:
    """Train an autoencoder (kind=kl or kind=vq) that compresses pictures to latents."""
    from latentdiff.training.config import AutoencoderSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data, "output": str(output)}
    settings = AutoencoderSettings.load(config, given)
    _show_progress()
    from latentdiff.training.autoencoder import train_autoencoder

    typer.echo(f"The autoencoder is in {train_autoencoder(settings)}")


@app.command()
def denoiser(
    data: Data,
    output: Output,
    autoencoder: Annotated[str, typer.Option(help="Folder of the autoencoder, or of a pipeline.")],
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a text-conditioned denoiser; OUTPUT becomes a pipeline folder that draws."""
    from latentdiff.training.config import DenoiserSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data, "output": str(output)}
    settings = DenoiserSettings.load(config, {**given, "autoencoder": autoencoder})
    _show_progress()
    from latentdiff.training.denoiser import train_denoiser

    typer.echo(f"The pipeline is in {train_denoiser(settings)}")


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


def _show_progress() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("latentdiff").setLevel(logging.INFO)
