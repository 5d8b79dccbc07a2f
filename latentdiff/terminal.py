"""The one place that prints: text that came from a file must not steer the terminal it is shown on.

Commands print with `say`; within `printable_messages`, as `latentdiff.cli.run` has it, the messages of every logger and
every warning are treated alike, those of other libraries too.
"""

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from types import TracebackType
from typing import Any

COLOURS = re.compile(r"\x1b\[(?:[0-3]|3[1235]|38;5;208)m")
"""Which transformers puts into its tables, where they are left out."""


def printable(text: str) -> str:
    """`text` on one line, with line ends, control characters and broken Unicode escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """The same with its lines kept; all but the first are indented, so that none can pass for another message."""
    return "\n  ".join(printable(line) for line in text.expandtabs().split("\n"))


def bytes_text(size: float) -> str:
    """Such as "12.3 MB"."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def say(text: str, err: bool = False) -> None:
    """Print a message of a command, to standard error if `err`."""
    import typer

    typer.echo(printable_lines(text), err=err)


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's ``sys.excepthook``, escaped."""
    text = "".join(traceback.format_exception(kind, error, trace)).expandtabs()
    print("\n".join(printable(line) for line in text.split("\n")), file=sys.stderr)


@contextmanager
def held_back(logger: str) -> Iterator[None]:
    """What a logger says within, in this thread, is said afterwards, and not at all if an error is raised."""
    records: list[logging.LogRecord] = []
    thread, log = get_ident(), logging.getLogger(logger)

    def hold(record: logging.LogRecord) -> bool:
        if record.thread == thread:
            records.append(record)
        return record.thread != thread

    log.addFilter(hold)
    try:
        yield
    finally:
        log.removeFilter(hold)
    for record in records:
        log.handle(record)


class PrintableRecord(logging.LogRecord):
    """A log record whose message can be shown."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        text = super().getMessage()
        return printable_lines(COLOURS.sub("", text) if self.name.startswith("transformers.") else text)


@contextmanager
def printable_messages() -> Iterator[None]:
    """Within, what loggers and warnings say can be shown, whoever handles it."""
    records, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def printable_warning(message: Any, *where: Any, **more: Any) -> str:
        return format_warning(printable_lines(str(message)), *where, **more)

    logging.setLogRecordFactory(PrintableRecord)
    warnings.formatwarning = printable_warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(records)
        warnings.formatwarning = format_warning
