"""A server in a thread, before a tiny model; its tests are left out where the extra `serve` is not installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from tiny import tiny_pipeline

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "multipart")
collect_ignore_glob = [] if all(map(find_spec, NEEDED)) else ["test_*.py"]


@pytest.fixture(scope="session")
def drawer() -> Any:
    """A pipeline that nobody changes."""
    return tiny_pipeline()


@pytest.fixture
def service(drawer: Any) -> Iterator[Any]:
    from served import made

    service = made(drawer)
    yield service
    service.queue.close(wait=False)


@pytest.fixture
def served(service: Any) -> Iterator[Any]:
    from served import serving

    with serving(service, hosts=("127.0.0.1",)) as running:
        yield running


@pytest.fixture
def paged(service: Any) -> Iterator[Any]:
    """With the page, without folders."""
    from served import serving

    with serving(service, hosts=("127.0.0.1",), folders=()) as running:
        yield running
