"""A tiny model in a folder, and the command line in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from latentdiff import cli


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline("clip").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command in an empty folder; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTDIFF_DEBUG", "0")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["latentdiff", *map(str, arguments)])
        try:
            cli.run(cli.application())
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run
