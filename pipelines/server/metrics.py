"""What a server counts, for Prometheus."""

from collections.abc import Callable, Collection
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """Counters of one server.

    Args:
        waiting: how many pictures wait.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "latentdiff_requests", "Requests that were answered.", ["path", "status"], registry=self.registry
        )
        self.pictures = Counter("latentdiff_pictures", "Pictures that were drawn.", registry=self.registry)
        self.seconds = Histogram(
            "latentdiff_request_seconds",
            "From a request for pictures to its answer.",
            registry=self.registry,
            buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500),
        )
        self.batches = Histogram(
            "latentdiff_batch_pictures",
            "Pictures in a batch.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32),
        )
        Gauge("latentdiff_waiting_pictures", "Pictures that wait.", registry=self.registry).set_function(waiting)

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        return generate_latest(self.registry)


class Counting:
    """An ASGI application whose answers are counted.

    Args:
        paths: that are told apart; others are counted together, so that nobody makes up names.
    """

    def __init__(self, app: Any, metrics: Metrics, paths: Collection[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
