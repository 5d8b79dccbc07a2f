"""``latentdiff app``."""

import webbrowser
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from latentdiff.pipelines.commands.model_options import grouped
from latentdiff.pipelines.commands.serve import KEY_VARIABLE, ServedLoading, ServingOptions, run_server


class AppOptions(ServingOptions):
    """Of the page's server."""

    host: str = Field("127.0.0.1", description="Address to listen on; others than this machine's own need a password.")
    port: int = Field(7860, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")


@partial(grouped, argument="model")
def app(
    loading: ServedLoading,
    serving: AppOptions,
    password: Annotated[
        str | None,
        typer.Option("--password", envvar=KEY_VARIABLE, help="That the page asks for; better set as the variable."),
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(
            "--folder",
            metavar="DIR",
            help="Folder whose models, LoRAs and pictures the page may use, and write models in; may be repeated.",
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Draw and fine-tune in the browser: previews, a gallery, masks to paint, and curves of a training.

    latentdiff app

    latentdiff app runs/mine --open

    latentdiff app --folder runs --folder pictures

    The page is for this machine only, unless --host says otherwise, and asks nothing of any other. Ctrl-C stops it.
    """
    run_server(loading, serving, password, folder or [], ready=webbrowser.open if browser else None)
