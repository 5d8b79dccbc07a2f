"""A command of this program in a process of its own, and what it says."""

import codecs
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence

from latentdiff.terminal import printable

LINES = 200
"""Of what it says, the last ones that are kept."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursors
SECRETS = ("LATENTDIFF_API_KEY",)


class Child:
    """Started at once; it goes on when nobody looks.

    Args:
        arguments: of ``latentdiff``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS} | {
            "PYTHONUNBUFFERED": "1"
        }
        self.asked_to_stop = False
        self._text = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latentdiff", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the server, which stops it in order
        )
        self._reader = threading.Thread(target=self._read, name="latentdiff-child", daemon=True)
        self._reader.start()

    @property
    def status(self) -> int | None:
        """Its exit status; None: it runs."""
        return self._process.poll()

    @property
    def text(self) -> str:
        """The last lines that it said."""
        return self._text

    def stop(self) -> None:
        """Ask it to save what it has, and to end."""
        self.asked_to_stop = True
        if self.status is None:
            self._process.terminate()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, within this time."""
        self._reader.join(seconds)
        try:
            self._process.wait(0 if self._reader.is_alive() else 10)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for chunk in iter(lambda: os.read(stream.fileno(), 2**16), b""):
                self._text = last_lines(self._text + decoder.decode(chunk))


def last_lines(text: str) -> str:
    """As a terminal shows it: of a line that is written over and over, such as a progress bar, the last state."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")[-LINES:]]
    return "\n".join(printable(CONTROL.sub("", line)) for line in lines)
