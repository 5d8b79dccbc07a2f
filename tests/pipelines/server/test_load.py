"""Many clients at once; `benchmarks/server_load.py` is the same for longer, and with figures."""

from pathlib import Path
from typing import Any

import psutil
import pytest
from clients import differing, load, serve

CLIENTS = 32
SECONDS = 15.0


@pytest.mark.slow
def test_many_clients(drawer: Any, tmp_path: Path) -> None:
    """Nothing is lost or mixed up, memory stays as it is, and batches are worth their while."""
    drawer.save_pretrained(tmp_path / "model")
    with serve(tmp_path / "model") as (url, process):
        load(url, SECONDS / 3, CLIENTS)  # warms up
        before = psutil.Process(process.pid).memory_info().rss
        found, took = load(url, SECONDS, CLIENTS)
        grown = psutil.Process(process.pid).memory_info().rss - before
    wrong, different = differing(found, drawer)
    with serve(tmp_path / "model", "--batch", "1") as (url, _):
        load(url, 1.0, CLIENTS)
        single, took_single = load(url, SECONDS, CLIENTS)
    together, apart = len(found) / took, len(single) / took_single
    print(f"{together:.1f} pictures/s together, {apart:.1f} one at a time; grown by {grown / 2**20:.1f} MiB")
    assert (wrong, different > 12) == (0, True)
    assert grown < 32 * 2**20
    assert together > 1.5 * apart
