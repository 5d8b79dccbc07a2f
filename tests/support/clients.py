"""Many clients of a server in a process of its own."""

import base64
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

PROMPTS = ["a red cup", "a blue cup", "green", "a yellow thing", "purple", "orange cup"]
SEEDS = 4


@dataclass(frozen=True)
class Got:
    """What a client got: (H, W, 3), and after how many seconds."""

    prompt: str
    seed: int
    picture: np.ndarray
    seconds: float


@contextmanager
def serve(model: object, *options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server of a model, until the context ends: its address, and its process."""
    with listening("serve", str(model), *options) as served:
        yield served


@contextmanager
def listening(*arguments: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """``latentdiff serve`` or ``app`` on a free port, until the context ends: its address, and its process."""
    command = [sys.executable, "-m", "latentdiff", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = re.search(r"http://[\w.:]+", process.stdout.readline())
        assert said is not None
        yield said[0], process
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def ask_for(url: str, prompt: str, seed: int, steps: int) -> Got:
    started = time.perf_counter()
    body = json.dumps({"prompt": prompt, "seed": seed, "steps": steps}).encode()
    with urlopen(Request(f"{url}/v1/images/generations", body), timeout=600) as answer:
        found = json.load(answer)["data"]
    took = time.perf_counter() - started
    assert [entry["seed"] for entry in found] == [seed]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[0]["b64_json"]))).convert("RGB"))
    return Got(prompt, seed, picture, took)


def load(url: str, seconds: float, clients: int, steps: int = 4) -> tuple[list[Got], float]:
    """What all clients got, each asking again as soon as it has its picture; and how long it took."""
    started = time.perf_counter()

    def client(number: int) -> list[Got]:
        choose, found = random.Random(number), []
        while time.perf_counter() - started < seconds:
            found.append(ask_for(url, choose.choice(PROMPTS), choose.randrange(SEEDS), steps))
        return found

    with ThreadPoolExecutor(clients) as pool:
        found = [one for part in pool.map(client, range(clients)) for one in part]
    return found, time.perf_counter() - started


def differing(found: list[Got], pipeline: Any, steps: int = 4, near: int = 1) -> tuple[int, int]:
    """How many are not what the pipeline draws alone, but for `near` of 255; and how many different ones there are."""
    alone: dict[tuple[str, int], np.ndarray] = {}
    wrong = 0
    for one in found:
        if (one.prompt, one.seed) not in alone:
            image = pipeline(one.prompt, seed=one.seed, num_inference_steps=steps).images[0]
            alone[one.prompt, one.seed] = np.asarray(image).astype(int)
        wrong += bool(np.abs(one.picture - alone[one.prompt, one.seed]).max() > near)
    return wrong, len({picture.tobytes() for picture in alone.values()})
