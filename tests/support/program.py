"""The program, run in this process."""

import sys
from typing import Any

import pytest

from latentdiff import cli


def run_program(monkeypatch: pytest.MonkeyPatch, *arguments: object, program: Any = None) -> int:
    """The exit status of ``latentdiff ARGUMENTS``, or of another program with them."""
    monkeypatch.setattr(sys, "argv", ["latentdiff", *map(str, arguments)])
    try:
        cli.run(program or cli.application())
    except SystemExit as end:
        return int(end.code or 0)
    return 0
