"""When a run stops before its last step: a signal, or the end of its time."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


class Stopping:
    """Whether a run should save and stop.

    Args:
        max_minutes: None is any time.
    """

    def __init__(self, accelerator: Accelerator, max_minutes: float | None) -> None:
        self.accelerator, self.max_minutes = accelerator, max_minutes
        self.started = time.monotonic()
        self.requested = False  # by a signal to this process

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, Ctrl-C and SIGTERM request a stop, and the time counts from here."""

        def remember(_number: int, _frame: Any) -> None:
            self.requested = True

        in_main_thread = threading.current_thread() is threading.main_thread()  # only there can handlers be set
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        previous = {number: signal.signal(number, remember) for number in numbers}
        self.started = time.monotonic()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def must_stop(self) -> bool:
        """Whether any process should stop. All processes must call it, and agree."""
        late = self.max_minutes is not None and time.monotonic() - self.started > self.max_minutes * 60
        stop = self.requested or late
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(stop), device=self.accelerator.device)
            stop = bool(self.accelerator.reduce(flag, "sum") > 0)
        return stop
