"""Many clients at once, of a server in a process of its own; LATENTDIFF_LOAD_SECONDS says for how long."""

import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from PIL import Image

CLIENTS = 32
SECONDS = float(os.environ.get("LATENTDIFF_LOAD_SECONDS", "15"))
PROMPTS = ["a red cup", "a blue cup", "green", "a yellow thing", "purple", "orange cup"]


@contextmanager
def serve(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "latentdiff", "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = re.search(r"http://\S+(?=/v1)", process.stdout.readline())
        assert said is not None
        yield said[0], process
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def draw(url: str, prompt: str, seed: int) -> np.ndarray:
    body = json.dumps({"prompt": prompt, "seed": seed, "steps": 4}).encode()
    with urlopen(Request(f"{url}/v1/images/generations", body), timeout=120) as answer:
        found = json.load(answer)["data"]
    assert [entry["seed"] for entry in found] == [seed]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[0]["b64_json"]))).convert("RGB")).astype(int)


def load(url: str, seconds: float) -> tuple[list[tuple[str, int, np.ndarray]], float]:
    """What all clients got, and how long it took."""
    started = time.perf_counter()

    def client(number: int) -> list[tuple[str, int, np.ndarray]]:
        choose, found = random.Random(number), []
        while time.perf_counter() - started < seconds:
            prompt, seed = choose.choice(PROMPTS), choose.randrange(4)
            found.append((prompt, seed, draw(url, prompt, seed)))
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        found = [one for part in pool.map(client, range(CLIENTS)) for one in part]
    return found, time.perf_counter() - started


@pytest.mark.slow
def test_many_clients(drawer: Any, tmp_path: Path) -> None:
    """Nothing is lost or mixed up, memory stays as it is, and batches are worth their while."""
    drawer.save_pretrained(tmp_path / "model")
    alone: dict[tuple[str, int], np.ndarray] = {}
    with serve(tmp_path / "model") as (url, process):
        load(url, SECONDS / 3)  # warms up
        before = psutil.Process(process.pid).memory_info().rss
        found, took = load(url, SECONDS)
        grown = psutil.Process(process.pid).memory_info().rss - before
        for prompt, seed, picture in found:
            if (prompt, seed) not in alone:
                image = drawer(prompt, seed=seed, num_inference_steps=4).images[0]
                alone[prompt, seed] = np.asarray(image).astype(int)
            assert np.abs(picture - alone[prompt, seed]).max() <= 1
    with serve(tmp_path / "model", "--batch", "1") as (url, _):
        load(url, 1.0)
        single, took_single = load(url, SECONDS)
    together, apart = len(found) / took, len(single) / took_single
    print(f"{together:.1f} pictures/s together, {apart:.1f} one at a time; grown by {grown / 2**20:.1f} MiB")
    assert len({picture.tobytes() for picture in alone.values()}) > 12
    assert grown < 32 * 2**20
    assert together > 1.5 * apart
