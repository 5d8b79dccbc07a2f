"""No test asks the network for anything, and each starts from the same random state."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # threads of many processes wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a shell starts with "&"
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

CACHES = tempfile.TemporaryDirectory(prefix="latentdiff-caches-")
"""Instead of the user's own; each test has one, and fixtures of several tests have one together."""
os.environ["LATENTDIFF_CACHE"] = CACHES.name


@pytest.fixture(autouse=True)
def shared_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's trainings keep what they encode; made by the first that does."""
    folder = Path(CACHES.name, f"{abs(hash(request.node.nodeid)):x}")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_said() -> None:
    """What is said once in a process is said in each test."""
    if encode := sys.modules.get("latentdiff.text.encode"):
        encode.warn_of_cut.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules whose tests fork come first: once something was compiled here, autograd no longer works in a fork."""
    items.sort(key=lambda item: not forks(item))


def forks(item: pytest.Item) -> bool:
    module = getattr(item, "module", None)
    return any(getattr(value, "__module__", None) == "lives" for value in vars(module).values()) if module else False
