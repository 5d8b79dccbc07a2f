"""A server in a thread, before a tiny model."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import uvicorn
from PIL import Image

from latentdiff.pipelines.batch.draw import SourcePictures
from latentdiff.pipelines.commands.serve import ServedLoading, listen, page_of
from latentdiff.pipelines.server.http import create_app
from latentdiff.pipelines.server.jobs import Event, Job, Preview
from latentdiff.pipelines.server.model import ServedModel
from latentdiff.pipelines.server.requests import Limits
from latentdiff.pipelines.server.service import Service
from latentdiff.pipelines.server.shelf import Shelf
from latentdiff.pipelines.server.stopping import StoppingServer

DRAW = "/v1/images/generations"
DIGEST = "0" * 64
LIMITS = Limits(pixels=32 * 32, steps=50, count=10, prompt=100, upload=2**16)


@dataclass
class Served:
    """A running server."""

    url: str
    service: Service
    server: Any
    thread: threading.Thread
    page: Any = None


@contextmanager
def serving(
    service: Service, folders: Sequence[Path] | None = None, grace: float = 120.0, **options: Any
) -> Iterator[Served]:
    """Until the context ends.

    folders: of its page; None: it has none.
    grace: seconds that running requests have at the end.
    """
    if folders is not None:
        places = {name: (Path("nowhere"), load) for name, load in service.shelf.loaders.items()}
        options["page"] = page_of(service, ServedLoading(), places, folders)
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = create_app(service, **options)
    server = StoppingServer(uvicorn.Config(app, log_level="warning"), service.stop, grace, service.unfinished)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{port}", service, server, thread, options.get("page"))
    finally:
        server.should_exit = True
        thread.join(120)
        listening.close()
    assert not thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    ending = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ending
        time.sleep(0.005)


@dataclass
class Held:
    """A job at whose first step the drawing thread waits, until `let_go`."""

    job: Job
    waiting: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    heard: list[Event] = field(default_factory=list)

    def hear(self, event: Event) -> None:
        self.heard.append(event)
        if isinstance(event, Preview):
            self.waiting.set()
            assert self.let_go.wait(120)


def hold(service: Service, prompt: str = "a cup", **asked: Any) -> Held:
    """Keep the server of this service busy."""
    settings = service.shelf.get().settings({"num_inference_steps": 3, **asked}, SourcePictures(), {})
    held = Held(Job("TextToImagePipeline", settings, prompt, [0], lambda event: held.hear(event), previews=1))
    service.queue.submit(held.job)
    assert held.waiting.wait(120)
    return held


def made(drawer: Any, **options: Any) -> Service:
    """A service of the tiny model."""
    shelf = Shelf({"tiny": lambda: ServedModel("tiny", drawer, lambda: DIGEST, {})})
    return Service(shelf, LIMITS, **{"places": 4, **options})


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, body and headers."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urlopen(request, timeout=120) as answer:
            return answer.status, answer.read(), answer.headers
    except HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"], error.headers


def answered(found: list[Any]) -> Image.Image:
    """The picture of an answer."""
    assert found[0][0] == 200, found
    return Image.open(io.BytesIO(base64.b64decode(json.loads(found[0][1])["data"][0]["b64_json"])))


def near(one: Image.Image, other: Image.Image) -> bool:
    """But for last bits, which depend on the batch."""
    return bool(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1)
