"""``latentdiff``, ``python -m latentdiff`` and ``accelerate launch -m latentdiff``."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130  # exit status, as shells have it


def stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: ends the program at once while it imports, for libraries take that for an error; later as usual."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def heed_interrupts() -> None:
    """Let Ctrl-C do what `stop` says, unless whoever started the program has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def main() -> None:
    """The ``latentdiff`` command."""
    heed_interrupts()
    from latentdiff import cli

    cli.main()


if __name__ == "__main__":
    main()
