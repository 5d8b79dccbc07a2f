"""A training that is killed at any moment, again and again, ends as one that was left in peace."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from discs import add_masks
from lives import FORKED, calm_and_killed, live, start, wait
from safetensors.torch import load_file
from straight_line import Line, go, settings
from tiny import autoencoder_settings, tiny_pipeline

from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import AutoencoderSettings, DenoiserSettings, DistillationSettings, PriorSettings
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.distill import distill
from latentdiff.training.trainers.prior import train_prior

pytestmark = [
    pytest.mark.slow,
    *FORKED,
]

KILLS = int(os.environ.get("LATENTDIFF_KILLS", "8"))  # of each training


def newest(output: Path) -> Path:
    return sorted((output / "training" / "checkpoints").glob("step-*"))[-1]


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, moving average, optimizer and counters of two runs' last checkpoints, bit for bit."""
    one, other = newest(a), newest(b)
    assert one.name == other.name
    files = [file.name for file in one.glob("*.safetensors")]
    assert {"trained.safetensors", "averaged-0.safetensors"} <= set(files)
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file
    for file in [file.name for file in one.glob("optimizer*.bin")]:
        states = [torch.load(folder / file, weights_only=True)["state"] for folder in (one, other)]
        for first, second in zip(states[0].values(), states[1].values(), strict=True):
            assert all(torch.equal(first[key], second[key]) for key in first)
    assert (one / "state.json").read_text() == (other / "state.json").read_text()
    rows = [[json.loads(line) for line in (run / "training/metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    for row in rows[0] + rows[1]:
        row.pop("pictures_per_second")
    assert rows[0] == rows[1]


def compare(train: Any, tmp_path: Path, *, kills: int, processes: int = 1) -> None:
    log, seed = tmp_path / "log.txt", len(tmp_path.name)
    calm_and_killed(lambda name: train(tmp_path / name), log, kills, seed, processes)
    assert_same_end(tmp_path / "calm", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob(".partial-step*"))


AGAINST = {"discriminator_weight": 0.5, "discriminator_start": 50, "discriminator_channels": 4, "r1_weight": 0.1}
CODES = {"kind": "vq", "num_vq_embeddings": 16, "codebook_restart": 5}


@pytest.mark.parametrize(("workers", "kind"), [(0, AGAINST), (1, CODES)], ids=["kl-discriminator", "vq-ema"])
def test_autoencoder(pictures: Path, tmp_path: Path, workers: int, kind: dict[str, Any]) -> None:
    def train(output: Path) -> None:
        values = {"resolution": 16, "batch_size": 2, "block_out_channels": (8, 16), "norm_num_groups": 4}
        values |= {"warmup_steps": 5, "max_steps": 400, "checkpoint_every": 2, "sample_every": 40, "log_every": 5}
        values |= {"data": str(pictures), "output": str(output), "num_workers": workers, **kind}
        values |= {"discriminator_layers": 1}
        train_autoencoder(AutoencoderSettings.load(None, {**values, "gradient_accumulation_steps": 2}))

    compare(train, tmp_path, kills=KILLS)


@pytest.mark.parametrize(
    ("processes", "objective", "masked"),
    [(1, "gaussian", False), (2, "gaussian", False), (1, "flow", True)],
)
def test_denoiser(
    denoiser_settings: dict[str, Any], tmp_path: Path, processes: int, objective: str, masked: bool
) -> None:
    if masked:
        add_masks(Path(denoiser_settings["data"]))

    def train(output: Path) -> None:
        values = {"max_steps": 300, "checkpoint_every": 2, "sample_every": 50, "log_every": 5, "num_workers": 0}
        values |= {"caption_dropout": 0.3, "crop": "random", "gradient_accumulation_steps": 2, "noise_offset": 0.1}
        values |= {"objective": objective, "masked_loss": masked}
        os.environ["LATENTDIFF_CACHE"] = str(output / "cache")  # the calm one fills none for others
        train_denoiser(DenoiserSettings.load(None, {**denoiser_settings, **values, "output": str(output)}))

    compare(train, tmp_path, kills=KILLS, processes=processes)


@pytest.mark.parametrize(("processes", "order"), [(1, "raster"), (2, "masked")])
def test_prior(pictures: Path, text_encoder: Path, tmp_path: Path, processes: int, order: str) -> None:
    vq = train_autoencoder(
        autoencoder_settings(pictures, tmp_path / "vq", kind="vq", num_vq_embeddings=16, max_steps=2)
    )

    def train(output: Path) -> None:
        values = {"resolution": 16, "batch_size": 2, "num_layers": 1, "num_attention_heads": 2, "caption_dropout": 0.3}
        values |= {"attention_head_dim": 8, "warmup_steps": 1, "max_steps": 300, "checkpoint_every": 2}
        values |= {"sample_every": 50, "log_every": 5, "gradient_accumulation_steps": 2, "order": order}
        values |= {"data": str(pictures), "autoencoder": str(vq), "text_encoder": str(text_encoder)}
        os.environ["LATENTDIFF_CACHE"] = str(output / "cache")
        train_prior(PriorSettings.load(None, {**values, "output": str(output)}))

    compare(train, tmp_path, kills=KILLS, processes=processes)


@pytest.mark.parametrize("method", ["lcm", "trajectory", "progressive", "adversarial", "dmd"])
def test_distillation(pictures: Path, tmp_path: Path, method: str) -> None:
    tiny_pipeline("clip").save_pretrained(tmp_path / "model")
    own = {
        "lcm": {"guidance_scale": [1, 5]},
        "trajectory": {"few_steps": 2, "trajectory_repeats": 1, "own_states_after": 0.3, "guidance_scale": [1, 5]},
        "progressive": {"start_steps": 16, "stage_steps": 15},
        "adversarial": {"discriminator_channels": 4, "r1_weight": 0.1, "discriminator_start": 20},
        "dmd": {},
    }

    def train(output: Path) -> None:
        values = {"batch_size": 2, "max_steps": 60, "checkpoint_every": 2, "sample_every": 40, "log_every": 5}
        values |= {"data": str(pictures), "output": str(output), "model": str(tmp_path / "model"), "method": method}
        distill(DistillationSettings.load(None, {**values, "gradient_accumulation_steps": 2, **own[method]}))

    compare(train, tmp_path, kills=KILLS)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_workers_too_saves_and_stops(how: signal.Signals, pictures: Path, tmp_path: Path) -> None:
    """As a terminal sends it that is closed, or in which somebody types Ctrl-C."""

    def train() -> None:
        os.setsid()
        values = {"resolution": 16, "batch_size": 2, "block_out_channels": (8, 16), "norm_num_groups": 4}
        values |= {"warmup_steps": 1, "max_steps": 10**6, "checkpoint_every": 2, "sample_every": 10**6}
        values |= {"data": str(pictures), "output": str(tmp_path / "out"), "num_workers": 2}
        train_autoencoder(AutoencoderSettings.load(None, values))

    log, checkpoints = tmp_path / "log.txt", tmp_path / "out" / "training" / "checkpoints"
    (child,) = start(train, log)
    while not list(checkpoints.glob("step-*")):
        time.sleep(0.01)
    os.killpg(child, how)
    assert wait([child]) == [128 + how], log.read_text()[-3000:]
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "training" / ".lock").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_costs_checkpoints_and_no_more(pictures: Path, tmp_path: Path) -> None:
    def train(output: Path) -> None:
        values = {"resolution": 16, "batch_size": 2, "block_out_channels": (8, 16), "norm_num_groups": 4}
        values |= {"warmup_steps": 1, "max_steps": 6, "checkpoint_every": 2, "data": str(pictures)}
        train_autoencoder(AutoencoderSettings.load(None, {**values, "output": str(output)}))

    def train_on_a_full_disk() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too long then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        train(tmp_path / "full")

    log = tmp_path / "log.txt"
    live(lambda: train(tmp_path / "calm"), log)
    assert wait(start(train_on_a_full_disk, log)) != [0]  # what it was told to write at the end, it could not
    said = log.read_text(encoding="utf-8")
    assert "could not be written" in said
    assert "older checkpoints are kept" in said
    folder = tmp_path / "full" / "training" / "checkpoints"
    assert not list(folder.glob("step-*"))
    assert not list(folder.glob(".partial-*"))
    assert wait(start(lambda: train(tmp_path / "full"), log)) == [0]
    assert_same_end(tmp_path / "calm", tmp_path / "full")


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    def train() -> None:
        run = go(TrainingRun(settings(tmp_path / "out", max_steps=10**6), Line()))
        run.finish()

    log, checkpoints = tmp_path / "log.txt", tmp_path / "out" / "training" / "checkpoints"
    children = start(train, log, processes=2)
    while not list(checkpoints.glob("step-*")):
        time.sleep(0.01)
    os.kill(children[1], signal.SIGTERM)
    assert wait(children) == [143, 143], log.read_text()[-3000:]
    assert log.read_text().count("Stopped by SIGTERM at step") == 1
