"""The routes: OpenAI's for pictures, and those for whoever runs the server."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from latentdiff import __version__
from latentdiff.interchange.png import picture_bytes
from latentdiff.interchange.user_files import parse_json_object
from latentdiff.pipelines.server.guard import Guard, TooLargeError, error_body
from latentdiff.pipelines.server.jobs import Event, Finished, Job, Preview
from latentdiff.pipelines.server.metrics import Counting
from latentdiff.pipelines.server.page import CLOSING, Page, add_page
from latentdiff.pipelines.server.queue import ClosedError, QueueFullError
from latentdiff.pipelines.server.requests import DrawRequest, RequestError
from latentdiff.pipelines.server.service import GoneError, Service, encoded, said_of

PICTURES = ("image", "mask")
DRAWING = "pictures are drawn by POST /v1/images/generations and /v1/images/edits"
CLIENT_GONE = 499  # nobody reads it; nginx calls it so


def create_app(
    service: Service, key: str | None = None, hosts: tuple[str, ...] | None = None, page: Page | None = None
) -> Any:
    """The server as an ASGI application.

    Args:
        key: that requests must have; None: everybody may ask.
        hosts: names by which it may be asked; None: any.
        page: to serve at ``/`` too.
    """

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        yield
        if page is not None:
            page.training.stop()
        await asyncio.to_thread(service.queue.close)
        if page is not None:
            await asyncio.to_thread(page.training.close, CLOSING)

    app = FastAPI(title="latentdiff", version=__version__, lifespan=living, docs_url=None, redoc_url=None)
    add_errors(app)
    add_status(app, service)
    add_drawing(app, service)
    if page is not None:
        add_page(app, service, page)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    public = ("/health",) if page is None else ("/health", "/")
    return Counting(Guard(app, key, hosts, service.limits.upload, public, service.stop), service.metrics, paths)


def add_drawing(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        values = parse_json_object(await request.body(), "the request's body")
        return await respond(service, request, values, {}, "image_generation")

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        values, sent = await read_form(request)
        if "image" not in sent:
            raise RequestError("image is missing; send the picture to start from", "image")
        return await respond(service, request, values, sent, "image_edit")


def add_status(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(service.list_models)}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(service.describe, name)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": len(service.queue), "drawing": service.queue.drawing}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def add_errors(app: FastAPI) -> None:
    """Every error as OpenAI's clients read it."""

    @app.exception_handler(RequestError)
    async def not_drawn(request: Request, error: RequestError) -> JSONResponse:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(str(error), kind, error.param, error.code), error.status)

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        body = error_body(str(error), "rate_limit_error", code="rate_limit_exceeded")
        return JSONResponse(body, 429, headers={"Retry-After": str(error.seconds)})

    @app.exception_handler(ClosedError)
    async def closed(request: Request, error: ClosedError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error"), 503, headers={"Retry-After": "10"})

    for leaving in (GoneError, ClientDisconnect):

        @app.exception_handler(leaving)
        async def gone(request: Request, error: Exception) -> Response:
            return Response(status_code=CLIENT_GONE)

    @app.exception_handler(TooLargeError)
    async def too_large(request: Request, error: TooLargeError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_request_error"), 413)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        said = {404: f"there is nothing here; {DRAWING}", 405: f"not by this method; {DRAWING}"}
        message = f"{request.method} {request.url.path}: {said.get(error.status_code, error.detail)}"
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, headers=error.headers)

    for mistake in (ValueError, TypeError, NotImplementedError, Exception):

        @app.exception_handler(mistake)
        async def failed(request: Request, error: Exception) -> JSONResponse:
            status, kind, message = said_of(error)
            return JSONResponse(error_body(message, kind), status)


async def read_form(request: Request) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    """Fields and pictures of a form.

    Raises:
        RequestError: it is no form, or has more than one picture, or something else as a file.
    """
    values: dict[str, Any] = {}
    sent: dict[str, tuple[str, bytes]] = {}
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("send a form (multipart/form-data) with image, prompt and, if you like, mask")
    try:
        form = await request.form(max_files=4, max_fields=64)
    except HTTPException as error:
        raise RequestError(f"the form cannot be read: {error.detail}") from None
    for name, value in form.multi_items():
        name = name.removesuffix("[]")
        if isinstance(value, UploadFile) != (name in PICTURES) or name in values or name in sent:
            raise RequestError(f"{name}: one {'file' if name in PICTURES else 'value'} is expected", name)
        if isinstance(value, UploadFile):
            sent[name] = (value.filename or "", await value.read())
        else:
            values[name] = value
    await form.close()
    return values, sent


async def respond(
    service: Service, http: Request, values: dict[str, Any], sent: dict[str, tuple[str, bytes]], event: str
) -> Response:
    """Pictures, all at the end, or as a stream of events."""
    request, job, events = await service.begin(values, sent)
    if request.stream:
        streamed = stream(service, request, job, events, until_gone(http), event)
        return StreamingResponse(streamed, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    found: dict[int, Finished] = {}
    async with aclosing(service.follow(job, events, until_gone(http))) as following:
        async for one in following:
            if isinstance(one, Finished):
                found[one.number] = one
    data = await asyncio.to_thread(lambda: [encoded(found[i], request) for i in range(len(found))])
    return JSONResponse({"created": int(time.time()), "data": data, **shown_of(request, job)})


def until_gone(http: Request) -> Callable[[], Awaitable[None]]:
    async def wait() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    return wait


def shown_of(request: DrawRequest, job: Job) -> dict[str, Any]:
    size = f"{job.settings.width}x{job.settings.height}"
    form = request.output_format or "png"
    return {"size": size, "output_format": form, "background": "opaque", "warnings": job.remarks}


async def stream(
    service: Service,
    request: DrawRequest,
    job: Job,
    events: "asyncio.Queue[Event]",
    gone: Callable[[], Awaitable[None]],
    event: str,
) -> AsyncIterator[str]:
    """Server-sent events: previews as they come, then each picture; or an error."""
    begun: dict[int, int] = {}
    try:
        async with aclosing(service.follow(job, events, gone)) as following:
            async for one in following:
                created = {"created_at": int(time.time()), **shown_of(request, job), "index": one.number}
                if isinstance(one, Preview):
                    index = begun[one.number] = begun.get(one.number, -1) + 1
                    content = {"b64_json": base64_png(one), "partial_image_index": index, "step": one.step + 1}
                    yield sent_event(f"{event}.partial_image", {**content, "steps": one.total, **created})
                else:
                    entry = await asyncio.to_thread(encoded, one, request)
                    yield sent_event(f"{event}.completed", {**entry, **created})
    except GoneError:
        return
    except RequestError as error:
        yield sent_event("error", error_body(str(error), "server_error", error.param, error.code))
    except Exception as error:
        _, kind, message = said_of(error)
        yield sent_event("error", error_body(message, kind))


def base64_png(preview: Preview) -> str:
    return base64.b64encode(picture_bytes(preview.image)).decode()


def sent_event(name: str, values: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **values})}\n\n"
