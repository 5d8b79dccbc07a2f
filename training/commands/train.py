"""``latentdiff train autoencoder``, ``latentdiff train denoiser`` and ``latentdiff train classifier``."""

from pathlib import Path
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


def autoencoder(
    data: Data,
    output: Output,
    config: Annotated[
        str | None, typer.Option(help="YAML file of settings, or one of ours: kl-f4, kl-f8, kl-f16, vq-f4, vq-f8, ...")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train an autoencoder (kind=kl, vq, gumbel or fsq) that compresses pictures to latents."""
    from latentdiff.training.recipes.autoencoders import configurations
    from latentdiff.training.settings import AutoencoderSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data, "output": str(output)}
    ours = configurations()
    if config is not None and config not in ours and not Path(config).is_file():
        raise FileNotFoundError(f"--config {config}: no such file, and ours are {', '.join(ours)}")
    settings = AutoencoderSettings.load(ours.get(config, config) if config else None, given)
    show_progress()
    from latentdiff.training.trainers.autoencoder import train_autoencoder

    announce(f"The autoencoder is in {train_autoencoder(settings)}")


def denoiser(
    data: Data,
    output: Output,
    autoencoder: Annotated[str, typer.Option(help="Folder of the autoencoder, or of a pipeline; pixels: none.")],
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a denoiser (condition=text, class or none); OUTPUT becomes a pipeline folder that draws."""
    from latentdiff.training.settings import DenoiserSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data, "output": str(output)}
    settings = DenoiserSettings.load(config, {**given, "autoencoder": autoencoder})
    show_progress()
    from latentdiff.training.trainers.denoiser import train_denoiser

    announce(f"The pipeline is in {train_denoiser(settings)}")


def classifier(
    data: Data,
    output: Output,
    model: Annotated[str, typer.Option(help="Pipeline folder of the class-conditional or unconditional model.")],
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a classifier of noisy pictures that guides a model; OUTPUT becomes a pipeline folder with both."""
    from latentdiff.training.settings import ClassifierSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data, "output": str(output)}
    settings = ClassifierSettings.load(config, {**given, "model": model})
    show_progress()
    from latentdiff.training.trainers.classifier import train_classifier

    announce(f"The pipeline with its classifier is in {train_classifier(settings)}")
