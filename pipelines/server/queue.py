"""One thread that draws, and a bounded queue before it: jobs of the same shape are drawn together."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from latentdiff.pipelines.batch.drawing_options import BATCH
from latentdiff.pipelines.server.jobs import Failed, Job, Row

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """There is no place for a further job.

    Args:
        seconds: after which there may be one.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {seconds} s")
        self.seconds = seconds


class ClosedError(Exception):
    """No jobs are taken any more."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; it takes no further requests")


class Queue:
    """Takes jobs in the order in which they come; what fits the first is drawn with it.

    Nothing waits for company: a batch is what is there when the one before is finished.

    Args:
        draw: draws a batch of rows of jobs that fit, and tells their listeners. It ends early if no job is wanted.
        size: pictures in a batch at most.
        places: jobs that may wait at most.
    """

    def __init__(self, draw: Callable[[list[Row]], None], size: int = BATCH, places: int = 64) -> None:
        self.draw, self.size, self.places = draw, size, places
        self.seconds_per_picture = 1.0
        self.drawing = 0
        """Pictures that are being drawn."""
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="latentdiff-draws", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Pictures that wait."""
        with self._changed:
            return self._pictures()

    def _pictures(self) -> int:
        return sum(len(job.seeds) - job.begun for job in self._waiting)

    def submit(self, job: Job) -> None:
        """Raises QueueFullError, or ClosedError after `close`."""
        with self._changed:
            if self._closed:
                raise ClosedError
            if len(self._waiting) >= self.places:
                self._drop_unwanted()
            if len(self._waiting) >= self.places:
                raise QueueFullError(max(1, round(self._pictures() * self.seconds_per_picture)))
            self._waiting.append(job)
            self._changed.notify_all()

    def close(self, wait: bool = True) -> None:
        """Take nothing more; wait until what was taken is drawn, or, if not `wait`, leave it."""
        with self._changed:
            self._closed = True
            if not wait:
                self._waiting.clear()
            self._changed.notify_all()
        if wait:
            self._thread.join()

    def _drop_unwanted(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.unwanted)

    def next_batch(self) -> list[Row]:
        """What is drawn next, taken out of the queue; nothing if nobody waits."""
        self._drop_unwanted()
        rows: list[Row] = []
        for job in list(self._waiting):
            taken = min(len(job.seeds) - job.begun, self.size - len(rows))
            if taken and job.fits(self._waiting[0]):
                rows += [Row(job, job.begun + i) for i in range(taken)]
                job.begun += taken
        self._waiting = deque(job for job in self._waiting if job.begun < len(job.seeds))
        return rows

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (rows := self.next_batch()):
                    if self._closed:
                        return
                    self._changed.wait()
                self.drawing = len(rows)
            started = time.perf_counter()
            self._draw(rows)
            self.drawing = 0
            took = (time.perf_counter() - started) / len(rows)
            self.seconds_per_picture += 0.3 * (took - self.seconds_per_picture)

    def _draw(self, rows: list[Row]) -> None:
        """If a batch fails, its jobs are drawn alone, so that one that cannot be drawn spoils no other."""
        jobs = list(dict.fromkeys(row.job for row in rows))
        try:
            self.draw(rows)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._draw([row for row in rows if row.job is job])
                return
            logger.warning("A request could not be drawn: %s: %s", type(error).__name__, error)
            jobs[0].cancel()
            jobs[0].listener(Failed(error))
