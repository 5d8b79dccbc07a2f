"""``latentdiff caption``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.pipelines.commands.model_options import Device, DeviceOption, pick_device
from latentdiff.terminal import say
from latentdiff.training.commands.settings_arguments import show_progress

EXAMPLE = "Salesforce/blip-image-captioning-base"


def caption(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of pictures.")],
    model: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help=f"An image-to-text model of transformers, such as {EXAMPLE}: a folder, or owner/name on the hub.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What captions begin with, as 'a drawing of', or what a chat model is asked."),
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Write captions for pictures that have none, each into a new .txt beside its picture; look them over.

    latentdiff caption pictures --model Salesforce/blip-image-captioning-base

    No file that exists is changed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if model is None:
        raise ValueError(
            f"name the model that captions, a folder or owner/name on the hub, for instance: latentdiff caption "
            f"{shlex.quote(str(folder))} --model {EXAMPLE}"
        )
    show_progress()
    from latentdiff.training.data.captioner import Captioner, caption_folder

    written = caption_folder(folder, Captioner.load(model, pick_device(device)), prompt)
    if not written:
        say(f"No caption was written: no picture in {folder} lacks one that could be made")
        return
    many = (
        "1 caption is in a .txt file beside its picture"
        if written == 1
        else f"{written} captions are in .txt files beside their pictures"
    )
    say(f"{many} in {folder}; look over what was written")
