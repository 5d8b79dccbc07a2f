"""``latentdiff doctor``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.pipelines.commands.model_options import be_quiet
from latentdiff.terminal import say
from latentdiff.training.commands.settings_arguments import Config, Overrides, parse_overrides

if TYPE_CHECKING:
    from latentdiff.training.data.doctor import DataReport

SHEET = {"made_by": "latentdiff doctor"}  # kept in the PNG, which may then be written again


def doctor(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DIR", help="Folder of pictures, *.tar shards, or a dataset's folder or name."),
    ] = None,
    overrides: Overrides = None,
    manifest: Annotated[
        Path | None, typer.Option(help="File to write about each picture; training reads it with manifest=FILE.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="See whether this model suits: by its autoencoder, text encoder and resolution."),
    ] = None,
    sheet: Annotated[
        Path, typer.Option(help="PNG of some pictures as --model's autoencoder gives them back, below the originals.")
    ] = Path("reconstructions.png"),
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Say in the manifest to leave out exact duplicates.")
    ] = False,
    config: Config = None,
) -> None:
    """Look at pictures and captions before training on them.

    latentdiff doctor pictures --manifest pictures.jsonl resolution=512

    latentdiff doctor pictures --model emoji

    No picture or caption is changed. The exit status is 0 if there is enough to train on, and 1 if a larger share than
    max_bad_share cannot be used.
    """
    from latentdiff.interchange.png import read_settings
    from latentdiff.pipelines.commands.models import model_shape
    from latentdiff.pipelines.storage.places import local_place
    from latentdiff.training.settings import DoctorSettings

    given: dict[str, object] = {**parse_overrides(overrides or []), "data": data}
    if drop_duplicates and manifest is None:
        raise ValueError("--drop-duplicates says something in the manifest; name one with --manifest FILE")
    if model is not None and sheet.exists() and (read_settings(sheet) or {}).get("made_by") != SHEET["made_by"]:
        raise FileExistsError(f"{sheet} exists and was not written by latentdiff doctor; choose another --sheet")
    settings = DoctorSettings.load(config, given)
    place = None if model is None else local_place(model)
    folder = None if model is None else place or configs_of(model)
    resolution, step = (None, None) if folder is None else model_shape(folder)
    if model is not None and resolution is None and "resolution" not in settings.model_fields_set:
        say(f"{model} does not say its resolution; judged at {settings.resolution}. resolution=... is another one.")
    own = {"resolution": resolution, "condition": None if folder is None else condition_of(folder)}
    own = {name: value for name, value in own.items() if value is not None and name not in settings.model_fields_set}
    settings = settings.model_copy(update=own)
    from latentdiff.training.data.doctor import examine_source, token_counter

    if model is not None:
        be_quiet()
    tokens = token_counter(model) if model is not None and folder is not None and settings.condition == "text" else None
    step = step if step is not None and settings.resolution % step == 0 else math.gcd(settings.resolution, 8)
    report = examine_source(settings, manifest, step, tokens, drop_duplicates)
    for line in report.lines():
        say(line)
    say("")
    for line in verdict(report, settings.max_bad_share, manifest):
        say(line)
    for line in reconstructions(model, report, sheet) if model is not None and report.pictures else ():
        say(line)
    if not report.entries or report.bad_share > settings.max_bad_share:
        raise typer.Exit(1)


def condition_of(place: Path) -> str:
    """What captions are for, with the model in a folder: a text encoder, names of classes, or nothing."""
    from latentdiff.pipelines.registry import kind_in

    condition = kind_in(place, textless=True).conditioned_by
    return condition if condition in ("class", "none") else "text"


def configs_of(model: str) -> Path:
    """A folder with the configs of a model on the hub that say its size, as far as it has them.

    Raises:
        HubError: it is not there, or the hub cannot be asked.
    """
    from huggingface_hub import snapshot_download

    from latentdiff.interchange.folders import DENOISERS
    from latentdiff.interchange.hub import asking_hub

    with asking_hub(model):
        names = ["model_index.json", *(f"{part}/config.json" for part in (*DENOISERS, "vae", "vqvae"))]
        return Path(snapshot_download(model, allow_patterns=names))


def reconstructions(model: str, report: "DataReport", sheet: Path) -> list[str]:
    """How well the model's autoencoder holds the pictures, and what to take if it does not; a PNG shows it."""
    from latentdiff.codec import Codec
    from latentdiff.interchange.png import save_picture
    from latentdiff.models import AutoencoderKL
    from latentdiff.pipelines.storage.places import local_place
    from latentdiff.training.evaluation.suitability import examine_autoencoder
    from latentdiff.training.starting_networks import load_autoencoder

    place = local_place(model)
    on_hub = place is None
    autoencoder = AutoencoderKL.from_pretrained(model, subfolder="vae") if on_hub else load_autoencoder(str(place))
    found = examine_autoencoder(Codec(autoencoder), report.pictures, report.resolution)
    save_picture(found.sheet, sheet, SHEET)
    advice = [found.advice(model)] if not found.suits else []
    return [found.figures(model), f"Originals, reconstructions and their differences: {sheet}", *advice]


def verdict(report: "DataReport", max_bad_share: float, manifest: Path | None) -> list[str]:
    """What to do now."""
    share = f"{100 * report.bad_share:.3g} % of the pictures cannot be used"
    if not report.entries:
        line = "There is nothing to train on."
    elif report.bad_share > max_bad_share:
        line = f"{share}; training stops above {100 * max_bad_share:g} % (max_bad_share={max_bad_share:g})."
    elif report.refused:
        line = f"Training goes on without what cannot be used ({share})."
    elif report.warnings:
        line = f"All {len(report.entries)} can be used; what is worth a look is named above."
    else:
        line = "Everything can be used."
    if manifest is None:
        return [line, "--manifest FILE writes what was found of each picture, for training to honour."]
    how = f'Set "use" to false for what to leave out, and train with manifest={manifest}'
    return [line, f"{manifest} describes each picture. {how}"]
