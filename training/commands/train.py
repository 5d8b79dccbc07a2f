"""``latentdiff train autoencoder`` and ``latentdiff train denoiser``."""

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


def autoencoder(data: Data, output: Output, config: Config = None, overrides: Overrides = None) -> None:
    """Train an autoencoder (kind=kl or kind=vq) that compresses pictures to latents."""
    from latentdiff.training.config import AutoencoderSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data, "output": str(output)}
    settings = AutoencoderSettings.load(config, given)
    show_progress()
    from latentdiff.training.autoencoder import train_autoencoder

    announce(f"The autoencoder is in {train_autoencoder(settings)}")


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
    show_progress()
    from latentdiff.training.denoiser import train_denoiser

    announce(f"The pipeline is in {train_denoiser(settings)}")
