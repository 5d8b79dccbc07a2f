"""No test asks the network for anything, and each starts from the same random state."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules whose tests fork come first: once something was compiled here, autograd no longer works in a fork."""
    items.sort(key=lambda item: not forks(item))


def forks(item: pytest.Item) -> bool:
    module = getattr(item, "module", None)
    return any(getattr(value, "__module__", None) == "lives" for value in vars(module).values()) if module else False
