"""The page to draw on and to train with, and what it asks for besides pictures."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from latentdiff.interchange.user_files import parse_json_object
from latentdiff.pipelines.registry import LONGEST_SIDE
from latentdiff.pipelines.server.library import Library
from latentdiff.pipelines.server.requests import RequestError, read_fields
from latentdiff.pipelines.server.service import Service
from latentdiff.pipelines.server.training import Training

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PARTS = ("page.css", "draw.js", "gallery.js", "source.js", "train.js")
CLOSING = 60.0
"""Seconds that a training has to save and end when the server stops."""


@dataclass(frozen=True)
class Page:
    """What a page has besides the server's models."""

    library: Library
    training: Training


class SizeRequest(BaseModel):
    """Width and height of a picture to start from."""

    model_config = ConfigDict(extra="allow")  # to say what was meant; see `read_fields`

    width: int = Field(ge=1, le=LONGEST_SIDE)
    height: int = Field(ge=1, le=LONGEST_SIDE)
    model: str | None = None


def content() -> str:
    """The page as one file, which asks for nothing more."""
    folder = files("latentdiff.pipelines.server").joinpath("web")
    text = folder.joinpath("page.html").read_text(encoding="utf-8")
    for name in PARTS:
        text = text.replace(f"/* {name} */", folder.joinpath(name).read_text(encoding="utf-8"))
    return text


def add_page(app: FastAPI, service: Service, page: Page) -> None:
    text = content()

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(text, headers=HEADERS)

    @app.get("/page")
    async def offered() -> dict[str, Any]:
        return await asyncio.to_thread(offer_of, service, page)

    @app.post("/page/model")
    async def model(request: Request) -> dict[str, Any]:
        typed = parse_json_object(await request.body(), "the request's body").get("model")
        if not isinstance(typed, str):
            raise RequestError("model: say which", "model")
        name = await asyncio.to_thread(page.library.add, typed)
        return await asyncio.to_thread(service.describe, name)

    @app.post("/page/size")
    async def size(request: Request) -> dict[str, int]:
        asked = read_fields(SizeRequest, parse_json_object(await request.body(), "the request's body"))
        model = await asyncio.to_thread(service.shelf.get, asked.model)
        width, height = model.size_from(asked.width, asked.height)
        return {"width": width, "height": height}

    add_training(app, page.training)


def offer_of(service: Service, page: Page) -> dict[str, Any]:
    """What can be chosen."""
    page.library.look()
    return {
        "models": service.list_models(),
        "folders": list(page.library.folders.roots),
        "loras": page.library.loras(),
        "scores": service.clip is not None,
    }


def add_training(app: FastAPI, training: Training) -> None:
    def route(path: str, act: Callable[[dict[str, Any]], None]) -> None:
        @app.post(f"/page/training/{path}")
        async def posted(request: Request) -> dict[str, Any]:
            values = parse_json_object(await request.body() or b"{}", "the request's body")
            await asyncio.to_thread(act, values)
            return await asyncio.to_thread(training.state)

    route("look", training.look)
    route("start", training.finetune)
    route("stop", lambda values: training.stop())

    @app.get("/page/training")
    async def state() -> dict[str, Any]:
        return await asyncio.to_thread(training.state)

    @app.get("/page/training/samples/{name}")
    async def sample(name: str) -> Response:
        found = await asyncio.to_thread(training.sample, name)
        return Response(found, media_type="image/png", headers={"X-Content-Type-Options": "nosniff"})
