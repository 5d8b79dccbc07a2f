"""The end of a server: what was asked for is finished within a time, or told that it is not."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from latentdiff.terminal import say

TICK = 0.5
"""Seconds after which who waits looks whether the server stops."""
MARGIN = 5
"""Seconds that clients have to take their answers, after which uvicorn cuts them off."""


@dataclass
class Stop:
    """When a server ends; before it is asked to, never."""

    at: float = float("inf")
    """By the monotonic clock."""

    def begin(self, seconds: float) -> None:
        self.at = min(self.at, time.monotonic() + seconds)

    @property
    def begun(self) -> bool:
        return self.at < float("inf")


class StoppingServer(uvicorn.Server):
    """Tells what is running that it is to end, before it waits for that.

    Asked a second time, it gives no more time than a step takes; a third time, it ends at once.

    Args:
        grace: seconds that running requests have.
        drawings: counts the pictures that are not finished.
    """

    def __init__(self, config: uvicorn.Config, stop: Stop, grace: float, drawings: Callable[[], int]) -> None:
        config.timeout_graceful_shutdown = int(grace) + MARGIN
        super().__init__(config)
        self.stop, self.grace, self.drawings = stop, grace, drawings
        self._asked = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._asked += 1
        if self._asked == 1:
            super().handle_exit(sig, frame)
        elif self._asked == 2:  # uvicorn's way would destroy tasks, while another thread draws
            self.stop.begin(0)
        else:
            os._exit(128 + sig)

    async def shutdown(self, sockets: Any = None) -> None:
        count = self.drawings()
        if count and not self.stop.begun:
            what = "1 drawing has" if count == 1 else f"{count} drawings have"
            say(f"stopping; {what} {self.grace:g} s; Ctrl-C again ends {'it' if count == 1 else 'them'}")
        self.stop.begin(self.grace)
        await super().shutdown(sockets)


async def received(receive: Callable[[], Awaitable[Any]], stop: Stop) -> Any:
    """A part of a request's body; None if the server stops before it comes."""
    coming = asyncio.ensure_future(receive())
    try:
        while not coming.done() and not stop.begun:
            await asyncio.wait({coming}, timeout=TICK)
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()
