"""``latentdiff train``'s commands, ``latentdiff finetune`` and ``latentdiff distill``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.training.commands.settings_arguments import (
    Config,
    Data,
    DryRun,
    Output,
    Overrides,
    begin,
    load_settings,
    train_and_say,
)


class Method(StrEnum):
    """What is trained."""

    full = "full"
    lora = "lora"
    dreambooth = "dreambooth"
    textual_inversion = "textual-inversion"


def autoencoder(
    data: Data = None,
    output: Output = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file of settings, or one of ours: kl-f4, kl-f8, kl-f16, vq-f4, vq-f8, ...")
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train an autoencoder (kind=kl, vq, gumbel, fsq or tiny) that compresses pictures to latents."""
    from latentdiff.training.recipes.autoencoders import configurations
    from latentdiff.training.settings import AutoencoderSettings

    ours = configurations()
    if config is not None and config not in ours and not Path(config).is_file():
        raise FileNotFoundError(f"--config {config}: no such file, and ours are {', '.join(ours)}")
    file = ours.get(config, config) if config else None
    settings = load_settings(AutoencoderSettings, file, overrides, data=data, output=output)
    begin(settings)
    from latentdiff.training.trainers.autoencoder import train_autoencoder

    train_and_say("autoencoder", train_autoencoder, settings, dry_run)


def denoiser(
    data: Data = None,
    output: Output = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(help="Folder of the autoencoder or of a pipeline, or a .safetensors file; pixels: none."),
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a denoiser (condition=text, class or none); OUTPUT becomes a pipeline folder that draws."""
    from latentdiff.training.settings import DenoiserSettings

    settings = load_settings(DenoiserSettings, config, overrides, data=data, output=output, autoencoder=autoencoder)
    begin(settings)
    from latentdiff.training.trainers.denoiser import train_denoiser

    train_and_say("pipeline", train_denoiser, settings, dry_run)


def classifier(
    data: Data = None,
    output: Output = None,
    model: Annotated[
        str | None,
        typer.Option(help="Pipeline folder, or .safetensors file, of the class-conditional or unconditional model."),
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a classifier of noisy pictures that guides a model; OUTPUT becomes a pipeline folder with both."""
    from latentdiff.training.settings import ClassifierSettings

    settings = load_settings(ClassifierSettings, config, overrides, data=data, output=output, model=model)
    begin(settings)
    from latentdiff.training.trainers.classifier import train_classifier

    train_and_say("pipeline with its classifier", train_classifier, settings, dry_run)


def prior(
    data: Data = None,
    output: Output = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(help="Folder of an autoencoder with codes (kind=vq, fsq, gumbel), or of a pipeline with one."),
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a transformer over an autoencoder's codes (order=masked or raster); OUTPUT becomes a folder that draws."""
    from latentdiff.training.settings import PriorSettings

    settings = load_settings(PriorSettings, config, overrides, data=data, output=output, autoencoder=autoencoder)
    begin(settings)
    from latentdiff.training.trainers.prior import train_prior

    train_and_say("pipeline", train_prior, settings, dry_run)


def finetune(
    data: Data = None,
    output: Output = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A packaged model (emoji is the default), a pipeline folder, a .safetensors file, or owner/name."
        ),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="All weights, a LoRA (the default), one subject, or a new word.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model on your own pictures; OUTPUT becomes a pipeline folder that draws.

    latentdiff finetune --data pictures --output runs/mine max_steps=400

    Repeat the command to go on where it stopped. 'latentdiff settings finetune' shows every setting.
    """
    from latentdiff.training.settings import FinetuneSettings

    chosen = method.value if method else None
    settings = load_settings(FinetuneSettings, config, overrides, data=data, output=output, model=model, method=chosen)
    begin(settings)
    from latentdiff.training.trainers.finetune import finetune as train

    train_and_say("pipeline", train, settings, dry_run)


def distill(
    data: Data = None,
    output: Output = None,
    model: Annotated[
        str | None,
        typer.Option(help="The teacher: a packaged model, a pipeline folder, a .safetensors file, or owner/name."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="In place of data: a file of prompts, of which the teacher draws the pictures.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Make a model that draws in few steps of one that takes many; OUTPUT becomes a pipeline folder that draws.

    latentdiff distill --model runs/mine --data pictures --output runs/fast method=lcm few_steps=4

    Repeat the command to go on where it stopped. 'latentdiff settings distill' shows every setting.
    """
    from latentdiff.training.settings import DistillationSettings

    settings = load_settings(
        DistillationSettings, config, overrides, data=data, output=output, model=model, prompts=prompts
    )
    begin(settings)
    from latentdiff.training.trainers.distill import distill as train

    train_and_say("pipeline", train, settings, dry_run)
