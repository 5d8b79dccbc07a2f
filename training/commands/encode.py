"""``latentdiff encode``."""

import re
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.terminal import say
from latentdiff.training.commands.settings_arguments import (
    Config,
    Data,
    Overrides,
    begin,
    is_first_process,
    load_settings,
)


def encode(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model to fine-tune, or the autoencoder of a new denoiser.")
    ],
    overrides: Overrides = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option(help="Folder for what is encoded: the cache_dir of trainings.")] = None,
    shard: Annotated[str, typer.Option(metavar="K/N", help="Encode the K-th of N parts only, from 1.")] = "1/1",
    config: Config = None,
) -> None:
    """Encode pictures and captions into a folder that trainings take as cache_dir, here or on many machines.

    latentdiff encode runs/autoencoder --data 'shards/{000..099}.tar' --output cache --shard 3/16 resolution=256

    latentdiff train denoiser --autoencoder runs/autoencoder --data 'shards/{000..099}.tar' --output runs/new
    cache_dir=cache resolution=256

    Give the settings of the training. Repeat a job to go on where it stopped. Jobs may share one folder, or have one
    each, which 'cp -rln FOLDER/. cache' joins without copying.
    """
    given = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", shard)
    part = (int(given[1]), int(given[2])) if given else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"--shard {shard}: expected K/N, the K-th of N parts, such as 3/16")
    from latentdiff.interchange.folders import find_model
    from latentdiff.training.settings import DenoiserSettings, FinetuneSettings

    place = Path(model).expanduser()
    alone = model == "pixels" or ((place / "config.json").is_file() and not (place / "model_index.json").is_file())
    settings: DenoiserSettings | FinetuneSettings
    if alone:
        settings = load_settings(DenoiserSettings, config, overrides, data=data, output=output, autoencoder=model)
    else:
        find_model(model)
        settings = load_settings(FinetuneSettings, config, overrides, data=data, output=output, model=model)
    if (Path(settings.output) / "training" / "checkpoints").is_dir():
        raise ValueError(f"--output {settings.output} holds a training; choose another folder")
    begin(settings)
    from latentdiff.training.loop.stopping import in_order
    from latentdiff.training.trainers.encode import encode as fill

    with in_order(lambda reason: say(f"Stopped by {reason}. Repeat the command to go on", err=True)):
        folder = fill(settings, part)
    if is_first_process():
        say(f"Encoded; trainings use it with cache_dir={folder}")
