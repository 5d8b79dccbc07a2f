"""When a run should save and stop: at a signal, or out of time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator

SAME = 1.0  # seconds within which a second Ctrl-C is the first, which a terminal and a launcher both send
FIRST_LOOK = 60.0  # seconds after which a run that has shown nothing yet draws samples
LEFT_OUT = b"\nStopping: the samples are left out, and what was trained is saved.\n"
ANSWER = b"\nStopping: the step under way is finished, and all is saved. Ctrl-C again leaves without that.\n"


class Interrupted(BaseException):
    """A signal came during what can be left undone, such as samples."""


class Terminated(SystemExit):
    """SIGTERM came where no run heeds it."""


def _terminate(number: int, _frame: Any) -> None:
    raise Terminated(128 + number)


@contextmanager
def in_order(say: Callable[[str], object]) -> Iterator[None]:
    """Within, a stop that no run has spoken of is said: what stopped the program goes to `say`.

    SIGTERM ends a lone process as Ctrl-C does, so that what was encoded is kept; one of several may wait for the others
    where no signal is heard, and dies at once.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    heeds = alone and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if heeds:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except Terminated:
        say("SIGTERM")
        raise
    except KeyboardInterrupt as stop:
        if not stop.args:  # see `Stopping.leave`
            say("Ctrl-C")
        raise
    finally:
        if heeds:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stopping:
    """Whether a run should save and stop.

    Args:
        max_minutes: None is any time.
    """

    def __init__(self, accelerator: Accelerator, max_minutes: float | None) -> None:
        self.accelerator, self.max_minutes = accelerator, max_minutes
        self.started = time.monotonic()
        self.has_shown = not accelerator.is_main_process  # which alone knows whether there is anything to see
        self.is_to_show = False  # for the first time; by `must_stop`
        self.signal = 0  # that this process got; by `must_stop` one that any process got
        self._asked = 0.0
        self._interruptible = False

    @property
    def requested(self) -> bool:
        """Whether a signal asks for a stop."""
        return self.signal != 0

    @property
    def reason(self) -> str:
        """What has stopped the run."""
        if self.signal == signal.SIGINT:
            return "Ctrl-C"
        return signal.Signals(self.signal).name if self.signal else f"max_minutes={self.max_minutes}"

    def leave(self) -> None:
        """End the program as the signal would have done, if it was one; see `TrainingRun.finish`."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt("the run has stopped")
        if self.signal:
            raise SystemExit(128 + self.signal)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, Ctrl-C, SIGTERM and the terminal's end request a stop.

        The request is answered at once; a second Ctrl-C is an ordinary one. A process that was started to outlive its
        terminal (nohup) does.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there can handlers be set
        numbers = [signal.SIGINT, signal.SIGTERM] if in_main_thread else []
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if in_main_thread and hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        previous = {number: signal.signal(number, self._remember) for number in numbers}
        child = getattr(signal, "SIGCHLD", None)  # nor this
        watch = signal.getsignal(child) if child is not None else None
        watch = getattr(watch, "watched", watch)  # of a run that was stopped before
        if (
            in_main_thread and child is not None and callable(watch)
        ):  # torch's, which raises when a loader's worker dies

            def unless_stopping(number: int, frame: Any) -> None:
                if not self.requested:  # a signal to the whole group ends the workers too
                    watch(number, frame)

            unless_stopping.watched = watch  # type: ignore[attr-defined]
            signal.signal(child, unless_stopping)
            previous[child] = watch
        try:
            yield
        finally:
            for number, handler in previous.items():
                if number != child or not self.requested:  # workers may end later than the run
                    signal.signal(number, handler)

    def _remember(self, number: int, _frame: Any) -> None:
        again = self.signal == number == signal.SIGINT and time.monotonic() - self._asked > SAME
        if again and not self._interruptible:
            raise KeyboardInterrupt
        if not self.requested:
            self.signal, self._asked = number, time.monotonic()
            if self.accelerator.is_main_process and sys.stderr is not None:
                with suppress(OSError):  # a terminal that has gone; not print, which a signal may have interrupted
                    os.write(2, LEFT_OUT if self._interruptible else ANSWER)
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def at_leisure(self, work: Callable[[], object], at_stop: bool = False) -> None:
        """Do what nothing depends on; a signal ends it at once, and with several processes it does not.

        at_stop: all is saved; otherwise the work is not begun once a stop is requested.
        """
        try:
            self._interruptible = self.accelerator.num_processes == 1
            if at_stop:
                with self.signals():
                    work()
            elif not (self._interruptible and self.requested):
                work()
            self._interruptible = False
        except Interrupted:
            pass
        finally:
            self._interruptible = False

    def must_stop(self) -> bool:
        """Whether any process should stop. All processes must call it, and agree, as on `is_to_show`."""
        passed = time.monotonic() - self.started
        late = self.max_minutes is not None and passed > self.max_minutes * 60
        self.is_to_show = not self.has_shown and passed > FIRST_LOOK
        if self.accelerator.num_processes > 1:
            found = torch.tensor([[self.signal, late, self.is_to_show]], device=self.accelerator.device)  # (1, 3)
            most = self.accelerator.gather(found).amax(0)
            agreed, late, self.is_to_show = int(most[0]), bool(most[1]), bool(most[2])
            self.signal = agreed or self.signal  # one that came meanwhile is for the next time
            return agreed != 0 or late
        return self.requested or late
