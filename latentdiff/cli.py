"""The command line: the commands of `latentdiff.pipelines.commands` and of `latentdiff.training.cli`."""

import gc
import os
import re
import sys
from functools import cache
from importlib import import_module
from typing import Annotated

import typer

from latentdiff.extensions import VARIABLE, extensions_of_environment, load_extensions
from latentdiff.memory import is_lack_of_memory
from latentdiff.terminal import printable_messages, say, show_traceback

USER_MISTAKES = (FloatingPointError, ValueError, TypeError, OSError, NotImplementedError)
TOO_LARGE = re.compile(r"file too large|os error 27\b", re.IGNORECASE)
FULL_DISK = re.compile(r"no space left|disk quota exceeded|os error (28|122)\b", re.IGNORECASE)
IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal .*\n[\w.]*Error: ", re.DOTALL)
"""What torch puts before the message of an error in a process that reads pictures ahead."""

DRAWING = ("generate", "replay", "many", "models", "convert", "serve", "app")
"""Commands of `latentdiff.pipelines.commands`, each in a module of its name."""


def show_version(wanted: bool) -> None:
    if wanted:
        from latentdiff import __version__

        say(f"latentdiff {__version__}")
        raise typer.Exit


def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the program an error comes from.", envvar="LATENTDIFF_DEBUG")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    extension: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE|FILE.py",
            help="Load a module that registers kinds of pipeline, processes or denoisers; may be repeated.",
        ),
    ] = None,
) -> None:
    if debug:
        os.environ["LATENTDIFF_DEBUG"] = "1"
    if extension:
        load_extensions(extension)
        os.environ[VARIABLE] = os.pathsep.join([*extensions_of_environment(), *extension])  # for further processes


@cache
def application(only: str | None = None) -> typer.Typer:
    """The program with all its commands.

    Args:
        only: a command that alone is wanted; if it draws, no other is loaded, which would take a tenth of a second.
    """
    app = typer.Typer(
        name="latentdiff",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Latent text-to-image diffusion: draw pictures from words, and train models that do.",
    )
    app.callback()(options)
    for name in (only,) if only in DRAWING else DRAWING:
        app.command(name)(getattr(import_module(f"latentdiff.pipelines.commands.{name}"), name))
    if only not in DRAWING:
        from latentdiff.training.cli import add_commands

        add_commands(app)
    return app


def run(program: typer.Typer) -> None:
    """Run a command-line application; what the user can mend is said without a traceback, with exit status 2."""
    try:
        with printable_messages():
            load_extensions(extensions_of_environment())
            program()
    except Exception as error:
        if os.environ.get("LATENTDIFF_DEBUG", "0") not in ("", "0"):
            sys.excepthook = show_traceback
            raise
        what, mistake = explain(error)
        say(f"Error: {what}", err=True)
        if not mistake:
            say("This may be a fault of the program; LATENTDIFF_DEBUG=1 shows where.", err=True)
        sys.exit(2 if mistake else 1)


def explain(error: Exception) -> tuple[str, bool]:
    """What an error says, and whether the user can mend it."""
    text = IN_WORKER.sub("", str(error)).rstrip("\n") or type(error).__name__
    if FULL_DISK.search(text):
        return f"the disk is full: {text}; make room and repeat the command", True
    if TOO_LARGE.search(text):
        what = re.sub(r"^\[Errno \d+\] ", "", text)
        return (
            f"{what}: a file of this size is not allowed there, by the disk's kind or by 'ulimit -f'; write elsewhere",
            True,
        )
    if is_lack_of_memory(error):
        advice = "; ".join(getattr(error, "__notes__", ())) or "ask for fewer at once, or for smaller ones"
        return f"there is not enough memory: {text}; {advice}", True
    ours = isinstance(error, ImportError) and error.name is None  # raised with what to install
    if isinstance(error, USER_MISTAKES) or ours:
        return text, True
    return f"{type(error).__name__}: {text}", False


def main() -> None:
    """The ``latentdiff`` command, but for Ctrl-C while it begins, which is `latentdiff.__main__`'s."""
    try:
        run(application(sys.argv[1] if sys.argv[1:] else None))
    finally:
        gc.freeze()  # or Python looks through the objects of all libraries for cycles once more before it ends, 1.5 s


if __name__ == "__main__":
    main()
