"""Trainings in processes that can be killed: forked from this one, which has imported everything; a life is cheap."""

import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

FORKED = (
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
)


def forks(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that starts processes by fork."""
    for mark in FORKED:
        test = mark(test)
    return test


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(work: Callable[[], object], log: Path, processes: int = 1) -> list[int]:
    """Fork `processes` children that do `work`, as ranks of one training if there are several; returns their ids."""
    port = free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            _be_a_child(work, log, rank, processes, port)
        children.append(child)
    return children


def _own_lock(bar: type) -> None:
    """Forked processes have one lock for their progress bars; who is killed while holding it would stop all others."""
    bar._lock = threading.RLock()  # type: ignore[attr-defined]
    for kind in bar.__subclasses__():
        _own_lock(kind)


def _be_a_child(work: Callable[[], object], log: Path, rank: int, processes: int, port: int) -> None:
    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore signals: nohup, "&"
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
        if processes > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
                "GLOO_SOCKET_IFNAME": "lo",
            }
        import torch
        import tqdm.std
        from accelerate.state import AcceleratorState, GradientState

        _own_lock(tqdm.std.tqdm)
        torch.set_num_threads(1)  # the parent's threads are not here
        AcceleratorState._reset_state(reset_partial_state=True)  # nor is its place among processes
        GradientState._reset_state()
        work()
        code = 0
    except SystemExit as stop:
        code = int(str(stop.code))
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(children: Sequence[int], seconds: float = 300) -> list[int]:
    """Exit codes of all children; negative for a signal. They are killed, and an error raised, after `seconds`."""
    end, codes = time.monotonic() + seconds, dict[int, int]()
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            kill([child for child in children if child not in codes])
            raise TimeoutError(f"still running after {seconds} s")
        time.sleep(0.005)
    return [codes[child] for child in children]


def kill(children: Sequence[int]) -> None:
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def live(work: Callable[[], object], log: Path, processes: int = 1) -> None:
    """Let `work` come to a good end in processes of its own."""
    assert set(wait(start(work, log, processes))) == {0}, log.read_text(encoding="utf-8")[-3000:]


def computed_by_children() -> float:
    """Processor seconds of all processes that were started here and have ended."""
    used = os.times()
    return used.children_user + used.children_system


def calm_and_killed(
    work: Callable[[str], object], log: Path, kills: int = 2, seed: int = 0, processes: int = 1
) -> None:
    """Let `work("calm")` live in peace; start `work("killed")` again and again, kill it after random times, then let it
    end.

    All lives that are cut short together take about half as long as the calm one computes, so that kills are timed
    alike on slow and on fast machines, and early rather than late where others compute too; half of the kills must
    have met a process that was alive at least.
    """
    before = computed_by_children()
    live(lambda: work("calm"), log, processes)
    longest = (computed_by_children() - before) / processes / kills
    chance, cut = random.Random(seed), 0
    for _ in range(kills * 3):
        children = start(lambda: work("killed"), log, processes)
        time.sleep(chance.uniform(0, longest))
        kill(children)
        codes = wait(children)
        cut += any(code == -signal.SIGKILL for code in codes)
        if cut >= kills or all(code == 0 for code in codes):
            break
    live(lambda: work("killed"), log, processes)
    assert cut >= kills // 2, f"only {cut} lives were cut short"
