"""Rows of what `gpu.py` measures, written down as they come, and times and memory on a device."""

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from latentdiff.memory import is_lack_of_memory

Work = Callable[[], Any]
MIB = 2**20


class Report:
    """Rows, written down whenever there is a new one.

    Attributes:
        left: seconds that remain.
    """

    def __init__(self, folder: Path, seconds: float, device: torch.device) -> None:
        self.folder, self.end, self.device = folder, time.monotonic() + seconds, device
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "processor (a rehearsal)"
        self.head = f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}"
        self.write()

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        found = {"where": self.head, "rows": self.rows}
        (self.folder / "measured.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
        lines = [self.head, ""]
        for what in dict.fromkeys(row["what"] for row in self.rows):
            rows = [row for row in self.rows if row["what"] == what]
            names = list(dict.fromkeys(name for row in rows for name in row if name != "what"))
            lines += [f"## {what}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
            lines += ["| " + " | ".join(shown(row.get(name)) for name in names) + " |" for row in rows]
            lines.append("")
        (self.folder / "table.md").write_text("\n".join(lines), encoding="utf-8")

    def measure(self, least: float, fill: Callable[[dict[str, Any]], None], **row: Any) -> None:
        """Add a row that `fill` completes; it says so if time or memory do not suffice.

        least: seconds that it needs on a GPU.
        """
        least = least if self.device.type == "cuda" else 0
        try:
            if self.left < least:
                row["note"] = f"no time left (it needs {least:.0f} s)"
            else:
                fill(row)
        except Exception as error:
            row["note"] = "does not fit into memory" if is_lack_of_memory(error) else f"failed: {error!r}"[:300]
        except SystemExit as error:  # of a training
            row["note"] = f"failed: {error}"[-600:]
        self.add(**row)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def shown(value: Any) -> str:
    return (
        ""
        if value is None
        else f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


class Timer:
    """Times work on a device, and takes its peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @torch.inference_mode()
    def seconds(self, work: Work) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    @torch.inference_mode()
    def peak(self, work: Work) -> float:
        """MiB, weights included; 0 on a processor."""
        if not self.cuda:
            work()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB

    def in_turn(self, works: dict[str, Work], repeats: int) -> dict[str, float]:
        """Median seconds of each, run alternately; each has run before, in `peak` or twice here."""
        for work in works.values():
            self.seconds(work)
        found = {name: [self.seconds(work) for _ in range(1)] for name, work in works.items()}
        for _ in range(repeats - 1):
            for name, work in works.items():
                found[name].append(self.seconds(work))
        return {name: statistics.median(times) for name, times in found.items()}


def beside(row: dict[str, Any], times: dict[str, float], peaks: dict[str, float] | None = None) -> None:
    """Fill a row with the times of all, their ratio to diffusers' and their memory."""
    for who, seconds in times.items():
        row[f"{who}, ms"] = 1e3 * seconds
        if who != "diffusers":
            row[f"{who}, times diffusers"] = times["diffusers"] / seconds
    for who, peak in (peaks or {}).items():
        row[f"{who}, peak MiB"] = peak
