"""A training on shards behind an address: killed, with a server that fails, and with a shard that changed meanwhile."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import encode, noise
from lives import FORKED, kill, live, start, wait
from safetensors.torch import load_file
from shard_server import Server, serving
from tars import write

from latentdiff.cli import explain
from latentdiff.training.data import remote
from latentdiff.training.settings import AutoencoderSettings
from latentdiff.training.trainers.autoencoder import train_autoencoder

pytestmark = [
    pytest.mark.slow,
    *FORKED,
]


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> Path:
    """The discs in three shards of four, on the disk of the server."""
    folder = tmp_path / "there"
    folder.mkdir()
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for number in range(3):
        members: dict[str, bytes] = {}
        for i, row in enumerate(rows[4 * number : 4 * number + 4]):
            members |= {
                f"{i}.png": (pictures / row["file_name"]).read_bytes(),
                f"{i}.txt": " ".join(row["text"]).encode(),
            }
        write(folder / f"{number}.tar", members)
    return folder


@pytest.fixture
def address(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Room is for copies of one shard of the three, so the pictures of two are asked for one by one."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("requests")
    monkeypatch.setattr(remote, "PAUSE", 0.005)
    monkeypatch.setenv("LATENTDIFF_SHARDS_GB", str(1.5 * (shards / "0.tar").stat().st_size / 1e9))
    with serving(shards) as address:
        yield f"{address}/{{0..2}}.tar"


def train(address: str, output: Path, **changes: Any) -> None:
    values = {"resolution": 16, "batch_size": 2, "block_out_channels": (8, 16), "norm_num_groups": 4, **changes}
    values |= {"warmup_steps": 1, "checkpoint_every": 2, "sample_every": 1000, "log_every": 1}
    try:
        train_autoencoder(AutoencoderSettings.load(None, {**values, "data": address, "output": str(output)}))
    except ValueError as error:
        print(explain(error)[0])
        raise SystemExit(2) from None


def newest(output: Path) -> Path:
    return sorted((output / "training" / "checkpoints").glob("step-*"))[-1]


def assert_same_end(a: Path, b: Path) -> None:
    one, other = newest(a), newest(b)
    states = [json.loads((checkpoint / "state.json").read_text()) for checkpoint in (one, other)]
    for state in states:
        del state["settings"]["data"], state["places"]
    assert states[0] == states[1]
    for name in ("trained.safetensors", "averaged-0.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def until_it_trains(child: int, output: Path, log: Path) -> None:
    """Wait for a checkpoint more."""
    folder = output / "training" / "checkpoints"
    before = set(folder.glob("step-*"))
    while not set(folder.glob("step-*")) - before:
        assert os.waitpid(child, os.WNOHANG)[0] == 0, log.read_text()[-3000:]
        time.sleep(0.01)


def test_killed_it_goes_on_exactly(address: str, shards: Path, tmp_path: Path) -> None:
    log, calm, killed = tmp_path / "log.txt", tmp_path / "calm", tmp_path / "killed"
    live(lambda: train(str(shards), calm, max_steps=24), log)
    for life in range(3):
        (child,) = start(lambda: train(address, killed, max_steps=24), log)
        if life == 0:
            time.sleep(0.3)
        else:
            until_it_trains(child, killed, log)
        kill([child])
        assert wait([child]) == [-signal.SIGKILL]
    live(lambda: train(address, killed, max_steps=24), log)
    assert_same_end(calm, killed)
    copies = list((killed / "training/stream/shards").iterdir())
    assert sum(copy.stat().st_size for copy in copies) <= float(os.environ["LATENTDIFF_SHARDS_GB"]) * 1e9
    assert any(asked.startswith("bytes=") for _, _, asked in Server.asked)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_fails_is_waited_for_and_named(address: str, shards: Path, workers: int, tmp_path: Path) -> None:
    log, calm, output = tmp_path / "log.txt", tmp_path / "calm", tmp_path / "out"
    changes = {"max_steps": 30, "num_workers": workers}
    live(lambda: train(str(shards), calm, **changes), log)
    (child,) = start(lambda: train(address, output, **changes), log)
    until_it_trains(child, output, log)
    Server.failures = remote.MORE_TRIES - 2
    while Server.failures:
        time.sleep(0.01)
    reached = newest(output).name
    Server.failures = 10**9
    assert wait([child]) == [2]
    said = log.read_text()
    assert "cannot be reached" in said
    assert "s more" in said, "it says that it waits"
    assert any(line.startswith(address.rpartition("/")[0]) for line in said.splitlines())
    assert "DataLoader worker" not in said, "no traceback of a worker's"
    assert newest(output).name >= reached, "a failure that passes ends nothing"
    Server.failures = 1
    live(lambda: train(address, output, **changes), log)
    assert "not those that this run had" not in log.read_text()
    assert_same_end(calm, output)


def test_a_shard_that_changes_is_named_and_the_run_goes_on_with_it(address: str, shards: Path, tmp_path: Path) -> None:
    log, output = tmp_path / "log.txt", tmp_path / "out"
    (child,) = start(lambda: train(address, output, max_steps=10**6), log)
    until_it_trains(child, output, log)
    write(shards / "2.tar", {"0.png": encode(noise(1)), "0.txt": b"noise", "1.png": encode(noise(2)), "1.txt": b"more"})
    assert wait([child]) == [2]
    said = log.read_text().rstrip().splitlines()[-1]
    assert said.startswith(f"{address.rpartition('/')[0]}/2.tar/")
    assert "has changed since the pictures were examined; repeat the command" in said
    steps = int(newest(output).name.rpartition("-")[2]) + 2
    live(lambda: train(address, output, max_steps=steps), log)
    assert "the pictures are not those that this run had so far" in log.read_text()
