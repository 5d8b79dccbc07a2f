"""Two hosts, each a network namespace with one end of a link: real processes and sockets; equal to one process."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import FORKED, kill, live
from safetensors.torch import load_file

from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.trainers.denoiser import train_denoiser

pytestmark = [
    pytest.mark.slow,
    *FORKED,
]

PORT = "29511"  # each namespace has ports of its own
SKEW = "import os, time\nreal = time.time\ntime.time = lambda: real() + float(os.environ.get('CLOCK_AHEAD', '0'))\n"
"""A host's clock that is wrong, for `sitecustomize`."""


def address(rank: int) -> str:
    return f"10.213.0.{rank + 1}"


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, with a link ``link0`` and ``link1`` between them."""
    names = [f"latentdiff-{os.getpid()}-{rank}" for rank in range(2)]
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces need Linux, iproute2 and root")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        ip("netns", "add", names[1])
        ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link1", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{address(rank)}/24", "dev", f"link{rank}")
            ip("-n", name, "link", "set", f"link{rank}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launcher(name: str, rank: int) -> list[str]:
    """Its module and options, as docs/machines.md has them."""
    if name == "torchrun":
        options = f"--nnodes 2 --nproc_per_node 1 --node_rank {rank} --master_addr {address(0)} --master_port {PORT}"
        return ["torch.distributed.run", *options.split()]
    options = f"--num_machines 2 --num_processes 2 --machine_rank {rank} --main_process_ip {address(0)}"
    options += f" --main_process_port {PORT} --mixed_precision no --dynamo_backend no --multi_gpu"
    return ["accelerate.commands.launch", *options.split()]


class Host:
    """A launcher and its process on one host."""

    def __init__(self, name: str, rank: int, command: list[str], arguments: list[str], folder: Path) -> None:
        (folder / "clock").mkdir(exist_ok=True)
        (folder / "clock" / "sitecustomize.py").write_text(SKEW)
        more = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": f"link{rank}"}
        more |= {"PYTHONPATH": str(folder / "clock"), "CLOCK_AHEAD": str(rank * 86_400)}
        self.name, self.log = name, folder / f"host-{rank}.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", *command, "-m", "latentdiff.training", *arguments],
                env={**os.environ, **more},
                cwd=folder,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """As a host that loses its power: all that runs there, for launchers start groups of their own."""
        found = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True)
        kill([int(number) for number in found.stdout.split()])
        self.process.wait()

    def wait(self, seconds: float = 600) -> int:
        return self.process.wait(seconds)


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((output / "training" / "checkpoints").glob("step-*"))[-1] / "trained.safetensors")


@pytest.mark.parametrize("launched_by", ["torchrun", "accelerate"])
def test_two_hosts_of_which_one_dies_train_what_one_process_does(
    launched_by: str, hosts: list[str], denoiser_settings: dict[str, Any], tmp_path: Path
) -> None:
    values = {**denoiser_settings, "checkpoint_every": 2, "log_every": 1, "max_steps": 60, "sample_every": 1000}

    def alone() -> None:
        train_denoiser(DenoiserSettings.load(None, {**values, "batch_size": 4, "output": str(tmp_path / "one")}))

    log = tmp_path / "log.txt"
    live(alone, log)

    output, values["batch_size"] = tmp_path / "two", 2
    options = [f"--{name}={values.pop(name)}" for name in ("data", "autoencoder")] + [f"--output={output}"]
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    arguments = ["denoiser", *options, *(f"{name}={value}" for name, value in given.items())]

    def launch() -> list[Host]:
        return [Host(name, rank, launcher(launched_by, rank), arguments, tmp_path) for rank, name in enumerate(hosts)]

    both = launch()
    try:
        end = time.monotonic() + 600
        while not any((output / "training" / "checkpoints").glob("step-*")) and time.monotonic() < end:
            assert all(host.process.poll() is None for host in both), both[0].log.read_text()[-3000:]
            time.sleep(0.05)
        both[1].kill()
        assert both[0].wait() != 0, "the other one does not go on alone, nor wait for ever"
        assert not (output / "model_index.json").exists()
        both = launch()
        assert [host.wait() for host in both] == [0, 0], both[0].log.read_text()[-3000:]
    finally:
        for host in both:
            host.kill()
    assert "resumed from" in both[0].log.read_text()
    one, other = trained(tmp_path / "one"), trained(output)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=1e-2)
    assert (output / "model_index.json").is_file()


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_pictures_than_processes_need(count: int, denoiser_settings: dict[str, Any], tmp_path: Path) -> None:
    """Of one picture a process has none to encode."""
    values = {**denoiser_settings, "max_pictures": count, "max_steps": 4, "log_every": 1}

    def train(name: str, size: int) -> None:
        train_denoiser(DenoiserSettings.load(None, {**values, "batch_size": size, "output": str(tmp_path / name)}))

    log = tmp_path / "log.txt"
    live(lambda: train("one", 4), log)
    live(lambda: train("two", 2), log, processes=2)
    one, other = trained(tmp_path / "one"), trained(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)
