"""A server in a thread, before a tiny model."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from latentdiff.pipelines.batch.draw import SourcePictures
from latentdiff.pipelines.commands.serve import listen
from latentdiff.pipelines.server.http import create_app
from latentdiff.pipelines.server.jobs import Event, Job, Preview
from latentdiff.pipelines.server.model import ServedModel
from latentdiff.pipelines.server.requests import Limits
from latentdiff.pipelines.server.service import Service
from latentdiff.pipelines.server.shelf import Shelf

DIGEST = "0" * 64
LIMITS = Limits(pixels=32 * 32, steps=50, count=10, prompt=100, upload=2**16)


@dataclass
class Served:
    """A running server."""

    url: str
    service: Service
    server: Any
    thread: threading.Thread


@contextmanager
def serving(service: Service, **options: Any) -> Iterator[Served]:
    """Until the context ends."""
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    app = create_app(service, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=120))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{port}", service, server, thread)
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
