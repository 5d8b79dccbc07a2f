"""``latentdiff serve``."""

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from latentdiff.extras import check_installed
from latentdiff.pipelines.batch.drawing_options import BATCH, Plain, RefinerOptions
from latentdiff.pipelines.commands.model_options import LoadingOptions, check_runtime, grouped, load_pipeline
from latentdiff.pipelines.commands.refiner import DENOISING_END, find_refiner
from latentdiff.pipelines.registry import find_kind, kind_in
from latentdiff.pipelines.storage.places import find_place
from latentdiff.terminal import say

if TYPE_CHECKING:
    from latentdiff.pipelines.server.model import ServedModel
    from latentdiff.pipelines.server.page import Page
    from latentdiff.pipelines.server.service import Service
    from latentdiff.pipelines.server.shelf import Loader

PACKAGED = "emoji"
KEPT = 2
"""Models that a page keeps loaded, at least."""
KEY_VARIABLE = "LATENTDIFF_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServedLoading(LoadingOptions, RefinerOptions):
    """Which model a server has, if it is but one, and how models are loaded."""

    model: str = Field(
        "", description="A packaged model (emoji is the default), a folder, a .safetensors file, or owner/name."
    )


class ServingOptions(Plain):
    """Where a server listens, and what it gives to one request."""

    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="MODEL", help="A model more, that requests name; may be repeated."),
    ] = None
    host: str = Field("127.0.0.1", description="Address to listen on; others than this machine's own need a key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    batch: int = Field(BATCH, ge=1, le=64, description="Pictures drawn at once.")
    queue: int = Field(64, ge=1, description="Requests that may wait; further ones are told to come again.")
    timeout: float = Field(300.0, gt=0, description="Seconds that a request may take, waiting included.")
    grace: float = Field(30.0, ge=0, description="Seconds that running requests have when the server stops.")
    max_pixels: int | None = Field(
        None, ge=1, description="Width times height of a picture at most; by default four times that of training."
    )
    max_steps: int = Field(100, ge=1, description="Denoising steps at most.")
    max_count: int = Field(10, ge=1, description="Pictures of one request at most.")
    max_prompt: int = Field(4000, ge=1, description="Characters of a prompt at most.")
    clip: str | None = Field(
        None,
        description="CLIP model that compares pictures with prompts (scores): a folder, or open_clip:NAME/WEIGHTS.",
    )


ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar=KEY_VARIABLE, help="Key that clients must send; better set as the variable, unseen by ps."
    ),
]


@partial(grouped, argument="model")
def serve(loading: ServedLoading, serving: ServingOptions, api_key: ApiKey = None) -> None:
    """Draw for programs: a server that OpenAI's clients talk to.

    latentdiff serve

    latentdiff serve runs/mine --port 9000

    latentdiff serve --model emoji --model runs/mine

    Pictures: POST /v1/images/generations and /v1/images/edits; also GET /v1/models, /health and /metrics. Requests for
    pictures of one size and the same steps are drawn together. Ctrl-C finishes what was taken, and stops.
    """
    run_server(loading, serving, api_key)


def run_server(
    loading: ServedLoading,
    serving: ServingOptions,
    key: str | None,
    folders: Sequence[Path] | None = None,
    ready: Callable[[str], object] | None = None,
) -> None:
    """Load the models, listen, and draw until stopped.

    Args:
        key: that requests must have.
        folders: serve the page too, with what is in these; None: no page.
        ready: is told the address when the models are loaded.

    Raises:
        ImportError, OSError, ValueError: a library is missing, the address cannot be had, or a model not served.
    """
    from latentdiff.interchange.folders import check_clip_source

    check_clip_source(serving.clip)
    check_serving(serving, key, "serve" if folders is None else "app")
    offers = offers_of(loading, serving)
    if folders is not None:
        check_folders(folders)
    listening = listen(serving.host, serving.port)
    host, port = listening.getsockname()[:2]
    with listening:
        service = service_of(offers, serving, kept=len(offers) if folders is None else max(KEPT, len(offers)))
        page = None if folders is None else page_of(service, loading, offers, folders)
        import uvicorn

        from latentdiff.pipelines.server.http import create_app
        from latentdiff.pipelines.server.stopping import StoppingServer

        names = LOOPBACK if serving.host in LOOPBACK else None
        settings = uvicorn.Config(create_app(service, key, names, page), log_level="warning")
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        draws = "draws" if len(offers) == 1 else "draw"
        say(f"{' and '.join(offers)} {draws} at {address}{'/v1' if page is None else ''}; Ctrl-C stops it")
        if ready is not None:
            ready(address)  # what comes before the server reads it waits in the socket
        try:
            StoppingServer(settings, service.stop, serving.grace, service.unfinished).run(sockets=[listening])
        except KeyboardInterrupt:  # which uvicorn raises again when all is done
            say("Stopped")


def check_serving(serving: ServingOptions, key: str | None, extra: str) -> None:
    """Raises ImportError or ValueError before anything is loaded."""
    check_installed(f"latentdiff {extra}", ("fastapi", "uvicorn", "multipart", "prometheus_client"), "serve")
    if serving.host not in LOOPBACK and not key:
        raise ValueError(
            f"--host {serving.host}: others could draw here; set a key that they must send, in the variable "
            f"{KEY_VARIABLE}" + ("" if extra == "serve" else " or with --password")
        )
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ValueError("the key must be of printable ASCII characters, as what is sent in a header")


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        what = f"cannot listen on {host}, port {port} ({error.strerror or error}); say another --port or --host"
        raise OSError(what) from error


def offers_of(loading: ServedLoading, serving: ServingOptions) -> dict[str, "tuple[Path, Loader]"]:
    """Where each model lies that a server was started with, and what loads it, by the name that requests give.

    Raises:
        FileNotFoundError, OSError, ValueError: there is no such model, or it does not draw from words.
    """
    offers: dict[str, tuple[Path, Loader]] = {}
    for model in [*filter(None, [loading.model]), *(serving.models or [])] or [PACKAGED]:
        place = find_place(model, loading.variant)
        check_runtime(loading.runtime, place, loading.device, loading.precision)
        name = shown_name(model, place)
        if name in offers:
            raise ValueError(f"two models are called {name}; rename the folder of one, or serve it by itself")
        offers[name] = (place, loader_of(loading, place, name))
    find_refiner(loading, loading.variant)
    if loading.refiner is not None and not any(is_sdxl(place) for place, _ in offers.values()):
        raise ValueError(f"--refiner is for SDXL, and {' and '.join(offers)} are of other kinds; leave it out")
    return offers


def is_sdxl(place: Path) -> bool:
    return kind_in(place, textless=True).family == "SDXL"


def shown_name(model: str, place: Path) -> str:
    """What clients are told of where a model is: no folders of this disk."""
    return place.name if os.sep in model and os.path.exists(os.path.expanduser(model)) else model


def loader_of(loading: ServedLoading, place: Path, name: str) -> "Loader":
    """What loads the model in `place`. Raises ValueError if it does not draw from words alone."""
    kind = kind_in(place, textless=True).name
    if find_kind(kind).conditioned_by != "text" or find_kind(kind).pictures:
        raise ValueError(f"the model {name} is a {kind}; only models that draw from words alone are served")
    return partial(load_served, loading, place, kind, name)


def load_served(loading: ServedLoading, place: Path, kind: str, name: str) -> "ServedModel":
    """A model, loaded, with the LoRAs, new words and refiner that it always has."""
    from latentdiff.interchange.fingerprint import digest_in_background
    from latentdiff.pipelines.batch.draw import load_adapters
    from latentdiff.pipelines.server.model import Refined, ServedModel

    adapters = loading.adapters()
    digest = digest_in_background(place, loading.variant)
    choices = (loading.device, loading.precision, loading.scheduler, kind, None, loading.variant, loading.runtime)
    pipeline = load_pipeline(place, *choices)
    pipeline.set_progress_bar_config(disable=True)
    load_adapters(pipeline, adapters["loras"], adapters["embeddings"])
    told: dict[str, Any] = {  # no folders of this disk
        of: [one.model_copy(update={"file": os.path.basename(one.file)}) for one in adapters[of]] for of in adapters
    }
    files = {one.sha256: Path(one.file) for one in adapters["loras"]}
    told["variant"] = loading.variant
    refined = None
    refiner, _ = find_refiner(loading, loading.variant) if is_sdxl(place) else (None, loading)
    if refiner is not None:
        end = loading.denoising_end or DENOISING_END
        refiner.join(pipeline, loading.device, loading.precision, loading.scheduler)
        refined = Refined(shown_name(refiner.name, refiner.place), end, refiner.digest.result)
    return ServedModel(name, pipeline, digest.result, told, files, refined)


def service_of(offers: dict[str, "tuple[Path, Loader]"], serving: ServingOptions, kept: int) -> "Service":
    """The models, loaded, with a queue before them."""
    from latentdiff.pipelines.server.requests import Limits
    from latentdiff.pipelines.server.service import Service
    from latentdiff.pipelines.server.shelf import Shelf

    shelf = Shelf({name: load for name, (_, load) in offers.items()}, kept)
    for name in offers:
        shelf.get(name)
    limits = Limits(serving.max_pixels, serving.max_steps, serving.max_count, serving.max_prompt)
    return Service(shelf, limits, serving.timeout, serving.batch, serving.queue, serving.clip)


def check_folders(folders: Sequence[Path]) -> None:
    """Raises ValueError or NotADirectoryError for folders that cannot be told to the page."""
    from latentdiff.pipelines.server.folders import label_of

    labels = [label_of(one) for one in folders]
    for folder, label in zip(folders, labels, strict=True):
        if not folder.expanduser().is_dir():
            raise NotADirectoryError(f"--folder {folder}: no such folder")
        if labels.count(label) > 1:
            raise ValueError(f"--folder {folder}: another one is called {label} too; name one above both")


def page_of(
    service: "Service", loading: ServedLoading, offers: dict[str, "tuple[Path, Loader]"], folders: Sequence[Path]
) -> "Page":
    """The page's models, packaged ones and those in the folders too, and its training."""
    from latentdiff.interchange.folders import packaged_models
    from latentdiff.pipelines.server.folders import Folders
    from latentdiff.pipelines.server.library import Library
    from latentdiff.pipelines.server.page import Page
    from latentdiff.pipelines.server.training import Training

    named = Folders(folders)
    places = {name: place for name, (place, _) in offers.items()}
    library = Library(service.shelf, places, named, partial(loader_of, loading))
    for name, place in packaged_models().items():
        if place not in places.values():
            library.put(place, name)
    service.find_lora = library.lora if folders else None
    return Page(library, Training(named, library.place_of))
