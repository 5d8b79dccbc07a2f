"""The program, run in this process."""

import sys

import pytest

from latentdiff import cli


def run_program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of ``latentdiff ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["latentdiff", *map(str, arguments)])
    try:
        cli.run(cli.application())
    except SystemExit as end:
        return int(end.code or 0)
    return 0
