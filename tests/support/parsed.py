"""The programs that a typed command calls, and what they would get."""

from typing import Any

import typer
from typer.main import get_command

from latentdiff import cli
from latentdiff.training import cli as training

MENTIONS = ("MissingParameter", "NoArgsIsHelpError", "BadOptionUsage")
"""Errors of commands of which a sentence does not give all."""


def of_latentdiff(words: list[str]) -> tuple[typer.Typer, list[str]] | None:
    """The program that a command calls, and with which arguments; None: another program."""
    if words[0].startswith("OMP_NUM_THREADS="):
        words = words[1:]
    if words[0] == "latentdiff":
        return cli.application(), words[1:]
    if "-m" in words and words[0] in ("accelerate", "torchrun", "python"):
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        programs = {"latentdiff": cli.application(), "latentdiff.training": training.launched}
        return (programs[module], arguments) if module in programs else None
    return None


def parse(program: typer.Typer, words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its parameters, as it would get them; what it does is not begun."""
    command: Any = get_command(program)
    context = command.make_context("latentdiff", [*words])
    while hasattr(command, "commands") and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context.info_name, context.params
