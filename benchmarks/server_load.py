"""``latentdiff serve`` under many clients: pictures per second, waiting, memory, and what drawing together is worth.

    python benchmarks/server_load.py                              # a tiny model, 32 clients for two minutes
    python benchmarks/server_load.py --model emoji --steps 4 --clients 8 --seconds 60

Each client asks again as soon as it has its picture. Every picture is compared with the one drawn alone: of the last
bits one of 255 may differ, or --near. Memory is the server's resident set, every tenth of the time. Then the same with
``--batch 1``. The clients are threads of this process, on the same machine.
"""

import argparse
import re
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from clients import Got, differing, load, serve
from tiny import tiny_pipeline

from latentdiff import TextToImagePipeline

READINGS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="packaged model or folder; by default a tiny one with random weights")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--near", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pipeline = tiny_pipeline() if arguments.model is None else TextToImagePipeline.from_pretrained(arguments.model)
        pipeline.set_progress_bar_config(disable=True)
        if arguments.model is None:
            pipeline.save_pretrained(Path(folder, "model"))
        measure(arguments, arguments.model or str(Path(folder, "model")), pipeline)


def measure(arguments: argparse.Namespace, model: str, pipeline: Any) -> None:
    rates = []
    for batch in (arguments.batch, 1):
        with serve(model, "--batch", str(batch)) as (url, process):
            load(url, arguments.seconds / 10, arguments.clients, arguments.steps)  # warms up
            stop, memory = threading.Event(), [resident(process.pid)]
            reader = threading.Thread(
                target=read_memory, args=(process.pid, arguments.seconds / READINGS, stop, memory), daemon=True
            )
            reader.start()
            found, took = load(url, arguments.seconds, arguments.clients, arguments.steps)
            stop.set()
            reader.join()
            drawn = mean_batch(url)
        wrong, different = differing(found, pipeline, arguments.steps, arguments.near)
        rates.append(len(found) / took)
        print(
            f"--batch {batch}: {len(found)} pictures in {took:.1f} s, {rates[-1]:.1f} a second, {drawn:.2f} in a batch"
        )
        print(f"  {waits(found)}; {different} different pictures, {wrong} not as drawn alone")
        print(f"  memory, MiB: {' '.join(f'{one:.0f}' for one in memory)}")
    print(f"together {rates[0] / rates[1]:.2f} times as many as one at a time")


def resident(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


def read_memory(pid: int, every: float, stop: threading.Event, memory: list[float]) -> None:
    while not stop.wait(every):
        memory.append(resident(pid))


def mean_batch(url: str) -> float:
    """Pictures in a batch, by the server's own count."""
    with urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    total, count = (float(re.search(rf"latentdiff_batch_pictures_{of} (\S+)", text)[1]) for of in ("sum", "count"))
    return total / count


def waits(found: list[Got]) -> str:
    seconds = sorted(one.seconds for one in found)
    return f"waited {statistics.median(seconds):.2f} s, one in twenty above {seconds[int(0.95 * len(seconds))]:.2f} s"


if __name__ == "__main__":
    main()
