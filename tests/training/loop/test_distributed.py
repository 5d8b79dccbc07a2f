"""Two processes (gloo, on the CPU) train what one does."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from discs import add_masks
from lives import FORKED, free_port, kill, live, start, wait
from safetensors.torch import load_file
from tiny import autoencoder_settings

from latentdiff.models.codebook_learning import CodebookLearner
from latentdiff.training.settings import AutoencoderSettings, DenoiserSettings, PriorSettings
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.prior import train_prior

pytestmark = [
    pytest.mark.slow,
    *FORKED,
]


CONFIGURATIONS = Path(__file__).parents[3] / "docs" / "accelerate"
SPREAD = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What `accelerate launch` sets for FSDP version 2."""


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((output / "training" / "checkpoints").glob("step-*"))[-1] / "trained.safetensors")


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "training" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def assert_alike(a: Path, b: Path) -> None:
    """Equal but for the order in which floating-point numbers are added."""
    one, other = trained(a), trained(b)
    assert one.keys() == other.keys()
    assert losses(a) == pytest.approx(losses(b), rel=1e-4)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)


def assert_divided_alike(train: Callable[..., object], tmp_path: Path) -> None:
    """`train(name, batch size, accumulation)` gives the same in one pass, in two, and in two processes."""
    log = tmp_path / "log.txt"
    live(lambda: train("one", 4), log)
    live(lambda: train("accumulated", 2, 2), log)
    live(lambda: train("two", 2), log, processes=2)
    assert_alike(tmp_path / "one", tmp_path / "accumulated")
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("objective", "masked"), [("gaussian", False), ("flow", True)])
def test_denoiser(denoiser_settings: dict[str, Any], tmp_path: Path, objective: str, masked: bool) -> None:
    if masked:
        add_masks(Path(denoiser_settings["data"]))

    def train(name: str, size: int, accumulation: int = 1) -> None:
        values = {
            "objective": objective,
            "masked_loss": masked,
            "max_steps": 6,
            "log_every": 1,
            "batch_size": size,
            "gradient_accumulation_steps": accumulation,
        }
        train_denoiser(DenoiserSettings.load(None, {**denoiser_settings, **values, "output": str(tmp_path / name)}))

    assert_divided_alike(train, tmp_path)
    assert not torch.equal(trained(tmp_path / "one")["denoiser.conv_in.weight"], torch.zeros(1))


@pytest.mark.parametrize("order", ["raster", "masked"])
def test_prior(order: str, pictures: Path, text_encoder: Path, tmp_path: Path) -> None:
    vq = train_autoencoder(
        autoencoder_settings(pictures, tmp_path / "vq", kind="vq", num_vq_embeddings=16, max_steps=2)
    )

    def train(name: str, size: int, accumulation: int = 1) -> None:
        values = {"resolution": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "order": order}
        values |= {"batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 6, "log_every": 1}
        values |= {"data": str(pictures), "autoencoder": str(vq), "text_encoder": str(text_encoder)}
        train_prior(PriorSettings.load(None, {**values, "warmup_steps": 1, "output": str(tmp_path / name)}))

    assert_divided_alike(train, tmp_path)


CODES = {"kind": "vq", "num_vq_embeddings": 16, "codebook_start": "none", "codebook_restart": 0}


@pytest.mark.parametrize("kind", [{}, CODES], ids=["kl", "vq"])
def test_autoencoder_goes_on_with_another_number_of_processes(
    kind: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    def train(name: str, size: int, steps: int) -> None:
        values = {"resolution": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "warmup_steps": 1, **kind}
        values |= {"batch_size": size, "max_steps": steps, "data": str(pictures), "output": str(tmp_path / name)}
        train_autoencoder(AutoencoderSettings.load(None, {**values, "log_every": 1}))

    log = tmp_path / "log.txt"
    live(lambda: train("a", 4, 6), log)
    live(lambda: train("b", 2, 3), log, processes=2)
    live(lambda: train("b", 4, 6), log)
    assert_alike(tmp_path / "a", tmp_path / "b")


def test_two_processes_against_a_discriminator_hold_the_same_codes(pictures: Path, tmp_path: Path) -> None:
    def train() -> None:
        values = {"resolution": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "warmup_steps": 1, **CODES}
        values |= {"codebook_start": "kmeans", "codebook_restart": 2, "batch_size": 2, "max_steps": 8}
        values |= {"discriminator_weight": 0.5, "discriminator_start": 2, "discriminator_channels": 4}
        values |= {"discriminator_layers": 1, "data": str(pictures), "output": str(tmp_path / "out"), "log_every": 1}
        settings = AutoencoderSettings.load(None, values)
        codes: list[torch.Tensor] = []
        original = CodebookLearner.update

        def update(learner: CodebookLearner) -> None:
            original(learner)
            codes.append(learner.codes.clone())

        CodebookLearner.update = update  # type: ignore[method-assign]
        train_autoencoder(settings)
        torch.save(codes, tmp_path / f"codes-{os.environ['RANK']}.pt")

    log = tmp_path / "log.txt"
    live(train, log, processes=2)
    first, second = (torch.load(tmp_path / f"codes-{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == 8
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "out/training/metrics.jsonl").read_text().splitlines()]
    assert sum("discriminator_accuracy" in row for row in rows) == 6
    assert (sorted((tmp_path / "out/training/checkpoints").glob("step-*"))[-1] / "trained-1.safetensors").is_file()


def test_weights_spread_by_fsdp(pictures: Path, tmp_path: Path) -> None:
    """And a run goes on with another number of processes, but not without FSDP."""

    def train(name: str, size: int, steps: int, spread: bool = False) -> None:
        if spread:
            os.environ |= SPREAD
        values = {"resolution": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "warmup_steps": 1}
        values |= {"batch_size": size, "max_steps": steps, "data": str(pictures), "output": str(tmp_path / name)}
        train_autoencoder(AutoencoderSettings.load(None, {**values, "log_every": 1, "sample_every": 3}))

    log = tmp_path / "log.txt"
    live(lambda: train("a", 6, 6), log)
    live(lambda: train("b", 3, 3, spread=True), log, processes=2)
    assert wait(start(lambda: train("b", 6, 6), tmp_path / "without.txt")) != [0]
    assert "step-00000003 was written under FSDP or DeepSpeed; go on" in (tmp_path / "without.txt").read_text()
    live(lambda: train("b", 2, 6, spread=True), log, processes=3)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    figures = [json.loads((tmp_path / name / "evaluation.json").read_text())["psnr"] for name in "ab"]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4), "measured with the averaged weights"
    one, other = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in "ab")
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-4, rtol=1e-3)


def launch(configuration: str, values: dict[str, Any], output: Path, log: Path) -> subprocess.Popen[bytes]:
    """A denoiser's training by ``accelerate launch`` with one of the documentation's configurations."""
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    options = [f"--{name}={given.pop(name)}" for name in ("data", "autoencoder")] + [f"--output={output}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / configuration)]
    command += ["--main_process_port", str(free_port()), "-m", "latentdiff.training", "denoiser", *options]
    command += [f"{name}={value}" for name, value in given.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("a") as file:
        return subprocess.Popen(command, env=environment, cwd=output.parent, stdout=file, stderr=file)


def train_alone(values: dict[str, Any], output: Path, log: Path) -> None:
    settings = DenoiserSettings.load(None, {**values, "batch_size": 4, "output": str(output)})
    live(lambda: train_denoiser(settings), log)


def test_fsdp_by_a_configuration_of_accelerate(denoiser_settings: dict[str, Any], tmp_path: Path) -> None:
    """The one in the documentation; layers are spread one by one, and the denoiser's parts are called alone."""
    values = {**denoiser_settings, "max_steps": 4, "log_every": 1, "checkpoint_every": 2}
    log, output = tmp_path / "log.txt", tmp_path / "two"
    train_alone(values, tmp_path / "one", log)
    assert launch("fsdp2.yaml", values, output, log).wait(600) == 0, log.read_text()[-3000:]
    assert losses(tmp_path / "one") == pytest.approx(losses(output), rel=1e-4)
    assert (output / "training" / "checkpoints" / "step-00000004" / "pytorch_model_fsdp_0").is_dir(), "in parts"
    assert_models_alike(tmp_path / "one", output)


def assert_models_alike(a: Path, b: Path) -> None:
    one, other = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-4, rtol=1e-3)


def test_deepspeed_by_a_configuration_of_accelerate(denoiser_settings: dict[str, Any], tmp_path: Path) -> None:
    """ZeRO stage 2 by the one in the documentation; killed at a checkpoint, it goes on as if it had not been."""
    pytest.importorskip("deepspeed")
    values = {**denoiser_settings, "max_steps": 40, "log_every": 1, "checkpoint_every": 2, "sample_every": 1000}
    log, output = tmp_path / "log.txt", tmp_path / "two"
    train_alone(values, tmp_path / "one", log)
    killed = launch("zero2.yaml", values, output, log)
    try:
        while not list((output / "training" / "checkpoints").glob("step-*")):
            assert killed.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
    finally:
        kill([process.pid for process in psutil.Process(killed.pid).children(recursive=True)] + [killed.pid])
        killed.wait()
    assert not (output / "model_index.json").exists(), "it was killed before its end"
    assert launch("zero2.yaml", values, output, log).wait(600) == 0, log.read_text()[-3000:]
    assert "resumed from" in log.read_text()
    assert losses(tmp_path / "one") == pytest.approx(losses(output), rel=1e-4)
    checkpoint = output / "training" / "checkpoints" / "step-00000040"
    assert len(list(checkpoint.rglob("*zero_pp_rank_*_optim_states.pt"))) == 2, "each process has half of the optimizer"
    assert_models_alike(tmp_path / "one", output)


def test_torchrun(pictures: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["-m", "latentdiff.training", "autoencoder", "--data", str(pictures), "--output", str(tmp_path / "a")]
    command += ["resolution=16", "batch_size=2", "max_steps=3", "warmup_steps=1"]
    command += ["block_out_channels=[8, 16]", "norm_num_groups=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The autoencoder is in") == 1, "only the main process reports"
    assert (tmp_path / "a" / "config.json").is_file()
