"""A tiny model in a folder."""

import pytest
from tiny import tiny_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline("clip").save_pretrained(folder)
    return str(folder)
