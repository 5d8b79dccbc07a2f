"""From a request to its pictures: what the routes share."""

import asyncio
import base64
import io
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentdiff.interchange.adapter_files import LORA_NAMES, find_adapter
from latentdiff.interchange.fingerprint import file_digest
from latentdiff.interchange.png import picture_bytes
from latentdiff.memory import is_lack_of_memory
from latentdiff.pipelines.batch.record import Lora
from latentdiff.pipelines.server.jobs import Event, Failed, Finished, Job, Preview
from latentdiff.pipelines.server.metrics import Metrics
from latentdiff.pipelines.server.model import ServedModel
from latentdiff.pipelines.server.queue import Queue
from latentdiff.pipelines.server.requests import (
    DrawRequest,
    Limits,
    RequestError,
    check_size,
    read_pictures,
    read_request,
)
from latentdiff.pipelines.server.shelf import Shelf
from latentdiff.pipelines.server.stopping import TICK, Stop

TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class GoneError(Exception):
    """The client does not wait any more."""


class Service:
    """Models, the queue before them, and what may be asked of them.

    Args:
        timeout: seconds that a request may take, waiting included.
        batch: pictures drawn at once.
        places: requests that may wait.
        clip: CLIP model that compares pictures with their prompts; None: there is none.
    """

    find_lora: Callable[[str], Path] | None = None
    """The file of a LoRA that a request names; None: requests name none."""

    def __init__(
        self,
        shelf: Shelf,
        limits: Limits,
        timeout: float = 300.0,
        batch: int = 8,
        places: int = 64,
        clip: str | None = None,
    ) -> None:
        self.clip = clip
        self.shelf, self.limits, self.timeout = shelf, limits, timeout
        self.queue = Queue(self._draw, batch, places)
        self.metrics = Metrics(lambda: len(self.queue))
        self.started = int(time.time())
        self.stop = Stop()

    def _draw(self, rows: list[Any]) -> None:
        self.metrics.batches.observe(len(rows))
        self.shelf.get(rows[0].job.settings.model).draw(rows)

    def unfinished(self) -> int:
        """Pictures that are drawn or wait."""
        return self.queue.drawing + len(self.queue)

    async def begin(
        self, values: Mapping[str, Any], files: Mapping[str, tuple[str, bytes]]
    ) -> tuple[DrawRequest, Job, "asyncio.Queue[Event]"]:
        """Put what is asked for into the queue; its events come as they happen.

        Raises:
            ValueError, QueueFullError, ClosedError: it cannot be drawn, or not now.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        request, job = await asyncio.to_thread(self._job, values, files, hear)
        self.queue.submit(job)
        return request, job, events

    def _job(
        self, values: Mapping[str, Any], files: Mapping[str, tuple[str, bytes]], hear: Callable[[Event], None]
    ) -> tuple[DrawRequest, Job]:
        request = read_request(values, self.limits)
        model = self.shelf.get(request.model)
        inputs, used = read_pictures(files)
        if inputs.image is None and request.strength is not None:
            raise RequestError("strength is for pictures to start from; send those to /v1/images/edits", "strength")
        most = self.limits.pixels or model.pixels
        width, height = request.sides
        if width is not None and height is not None:
            check_size(width, height, model.factor, most, model.own_size)
        settings = model.settings(request.options, inputs, used, self._loras(request, model))
        if request.scores and self.clip is None:
            raise RequestError("scores: there is no CLIP model here; start the server with --clip", "scores")
        check_size(settings.width, settings.height, model.factor, most, model.own_size)
        if model.fixed_steps is None and settings.num_inference_steps > self.limits.steps:
            message = f"the model takes {settings.num_inference_steps} steps, this server gives {self.limits.steps}"
            raise RequestError(f"steps: {message}; say how many", "steps")
        kind = model.kind_for(inputs)
        previews = (request.partial_images or 0) if request.stream else 0
        ending = time.monotonic() + self.timeout
        clip = self.clip if request.scores else None
        remarks = model.remarks(settings, request.prompt, inputs)
        job = Job(kind, settings, request.prompt, request.seeds(), hear, inputs, previews, ending, clip, remarks)
        return request, job

    def _loras(self, request: DrawRequest, model: ServedModel) -> list[Lora]:
        """What a request names, for the record; the model learns where the files are."""
        found = []
        for name, scale in request.loras:
            if self.find_lora is None:
                raise RequestError("lora: this server draws as it was started; leave it out", "lora")
            try:
                file = find_adapter(self.find_lora(name), LORA_NAMES)
            except OSError:  # which names folders of this disk
                raise RequestError(f"lora: there is no LoRA in {name}; name its .safetensors file", "lora") from None
            found.append(Lora(file=name, sha256=file_digest(file), scale=scale))
            model.files[found[-1].sha256] = file
        return found

    async def follow(
        self, job: Job, events: "asyncio.Queue[Event]", gone: Callable[[], Awaitable[None]]
    ) -> AsyncGenerator[Preview | Finished, None]:
        """The events of a job, until all of its pictures are there; it is cancelled when nobody listens any more.

        Args:
            gone: ends when the client has gone.

        Raises:
            GoneError: the client has gone.
            RequestError: it took too long.
            Exception: what went wrong while drawing.
        """
        started = time.perf_counter()
        leaving = asyncio.ensure_future(gone())
        try:
            missing = len(job.seeds)
            while missing:
                event = await self._next(job, events, leaving)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    missing -= 1
                    self.metrics.pictures.inc()
                yield event
            self.metrics.seconds.observe(time.perf_counter() - started)
        finally:
            job.cancel()
            leaving.cancel()

    async def _next(self, job: Job, events: "asyncio.Queue[Event]", leaving: "asyncio.Future[None]") -> Event:
        coming = asyncio.ensure_future(events.get())
        either: set[asyncio.Future[Any]] = {coming, leaving}
        try:
            while not coming.done():
                left = min(job.deadline, self.stop.at) - time.monotonic()
                if leaving.done():
                    raise GoneError
                if left <= 0:
                    raise self._too_late(job)
                await asyncio.wait(either, timeout=min(left, TICK), return_when=asyncio.FIRST_COMPLETED)
            return coming.result()
        finally:
            coming.cancel()

    def _too_late(self, job: Job) -> RequestError:
        if self.stop.at < job.deadline:
            message = "the server is stopping, and the picture was not finished in time; ask again later"
            return RequestError(message, code="stopping", status=503)
        message = f"the picture was not finished within {self.timeout:g} s; ask for fewer or smaller ones, or later"
        return RequestError(message, code="timeout", status=504)

    def describe(self, name: str) -> dict[str, Any]:
        """A model as ``GET /v1/models/NAME`` shows it; it is loaded for that."""
        model, limits = self.shelf.get(name), self.limits
        width, height = model.own_size
        pixels = limits.pixels or model.pixels
        return {
            **self.named(name),
            "width": width,
            "height": height,
            "multiple_of": model.factor,
            "steps": model.pipeline.defaults["num_inference_steps"],
            "guidance_scale": model.pipeline.defaults["guidance_scale"],
            "fixed_steps": model.fixed_steps is not None,
            "takes_strength": model.takes_strength,
            **({} if model.refined is None else {"refiner": model.refined.name}),
            "limits": {"pixels": pixels, "steps": limits.steps, "count": limits.count, "prompt": limits.prompt},
        }

    def named(self, name: str) -> dict[str, Any]:
        """A model that need not be loaded."""
        return {"id": name, "object": "model", "created": self.started, "owned_by": "latentdiff"}

    def list_models(self) -> list[dict[str, Any]]:
        """All models, with what is known of those that are loaded."""
        return [self.describe(one) if self.shelf.is_loaded(one) else self.named(one) for one in self.shelf.names]


def encoded(event: Finished, request: DrawRequest) -> dict[str, Any]:
    """A finished picture as an entry of ``data``, with its seed; PNGs have their record in them."""
    image, form = event.drawn.image, request.output_format or "png"
    if form == "png":
        content = picture_bytes(image, event.record.dump())
    else:
        stream = io.BytesIO()
        quality = 95 if request.output_compression is None else request.output_compression
        image.save(stream, format=form.upper(), quality=quality)
        content = stream.getvalue()
    text = base64.b64encode(content).decode()
    entry: dict[str, Any] = {"seed": event.record.seed}
    if request.response_format == "url":
        entry["url"] = f"data:{TYPES[form]};base64,{text}"
    else:
        entry["b64_json"] = text
    if event.drawn.score is not None:
        entry["score"] = event.drawn.score
    flags = {"withheld": event.drawn.withheld, "not_finite": event.drawn.spoilt}
    return entry | {name: True for name, there in flags.items() if there}


def said_of(error: Exception) -> tuple[int, str, str]:
    """Status, kind and message of what went wrong while a picture was drawn."""
    if is_lack_of_memory(error):
        return 503, "server_error", "there is not enough memory for this picture; ask for fewer or smaller ones"
    if isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return 400, "invalid_request_error", str(error)
    return 500, "server_error", f"the server failed: {type(error).__name__}; its log says more"
