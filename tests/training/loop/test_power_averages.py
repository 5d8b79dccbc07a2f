"""Averages of any length after training: the paper's formulas, a toy run, a real one, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import typer
from lives import calm_and_killed, forks, live
from safetensors.torch import load_file, save_file
from straight_line import Line, go, settings
from tiny import DENOISER
from torch import nn
from typer.testing import CliRunner

from latentdiff.training.card.card import called
from latentdiff.training.commands.average import average as command
from latentdiff.training.loop.power_averages import LENGTHS, PowerAverages, exponent, mixture, overlap
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.trainers.average import average, kept_averages
from latentdiff.training.trainers.denoiser import train_denoiser


def test_exponents_are_the_papers() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)  # EDM2, Sec. 3.2
    assert exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    assert exponent(12**-0.5) == pytest.approx(0, abs=1e-5)
    for gamma in (0.5, 3.0, 40.0):
        assert exponent(math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3)) == pytest.approx(gamma)
    for wrong in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match="cannot be: it is a share of the run"):
            exponent(wrong)


def test_overlaps_are_integrals() -> None:
    tau = (np.arange(200_000) + 0.5) / 200_000 * 8

    def profile(gamma: float, end: float) -> Any:
        return np.where(tau < end, (gamma + 1) * tau**gamma / end ** (gamma + 1), 0)

    for one, two in (((3.0, 8.0), (7.0, 5.0)), ((0.0, 4.0), (2.0, 8.0)), ((6.9, 8.0), (6.9, 8.0))):
        assert overlap(one, two) == pytest.approx(float((profile(*one) * profile(*two)).mean() * 8), rel=1e-4)


def weights_of(length: float, steps: int) -> torch.Tensor:
    """What each step counts: the profile's integral over it."""
    ends = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (exponent(length) + 1)
    return ends.diff()


def test_a_toy_run() -> None:
    """Direct averages of all weights, beside those that are followed, and those put together afterwards."""
    steps, walk = 240, torch.randn(240, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    parameter = nn.Parameter(torch.zeros(50))
    averages = PowerAverages({"a": parameter})
    kept = []
    for step in range(1, steps + 1):
        parameter.data = walk[step - 1].float()
        averages.update()
        if step % 8 == 0:
            kept += [
                (exponent(length), step, one[0].double().clone())
                for length, one in zip(LENGTHS, averages.averages, strict=True)
            ]
    for length, one in zip(LENGTHS, averages.averages, strict=True):
        torch.testing.assert_close(one[0], (weights_of(length, steps) @ walk).float(), atol=1e-4, rtol=1e-4)
    for length, far in ((0.05, 1e-6), (0.1, 1e-6), (0.07, 0.02), (0.15, 0.02), (0.25, 0.05)):
        factors, missed = mixture([(gamma, step) for gamma, step, _ in kept], (exponent(length), steps))
        assert missed < far
        assert float(factors.sum()) == pytest.approx(1, abs=1e-6)
        found = sum(factor * one for factor, (_, _, one) in zip(factors.tolist(), kept, strict=True))
        wanted = weights_of(length, steps) @ walk
        assert float((found - wanted).norm() / (wanted - walk[-1]).norm()) < max(3 * far, 1e-3)


@pytest.mark.parametrize("length", [0.06, 0.15, 0.2])
def test_a_profile_that_is_put_together_is_the_papers(length: float) -> None:
    """Its curve over time beside tau^gamma, and beside the best that least squares on that curve can do."""
    ticks, steps = (np.arange(30_000) + 0.5) / 1000, range(1, 31)
    kept = [(exponent(one), step) for step in steps for one in LENGTHS]

    def curve(gamma: float, end: float) -> Any:  # EDM2, Eq. 3
        return np.where(ticks < end, (gamma + 1) * ticks**gamma / end ** (gamma + 1), 0)

    factors, missed = mixture(kept, (exponent(length), 30))
    wanted, curves = curve(exponent(length), 30), np.stack([curve(*one) for one in kept], axis=1)
    norm = np.linalg.norm(wanted)
    assert np.linalg.norm(curves @ factors - wanted) / norm == pytest.approx(missed, rel=0.02, abs=1e-4)
    best = curves @ np.linalg.lstsq(curves, wanted)[0]  # App. C.3, where the factors' sum is left free
    assert missed <= 1.1 * np.linalg.norm(best - wanted) / norm + 1e-4
    assert missed < 0.01


def test_a_run_that_stops_keeps_the_same_averages(tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> dict[str, dict[str, torch.Tensor]]:
        go(TrainingRun(settings(tmp_path / name, ema_snapshots=4, **changes), Line()))
        return {file.name: load_file(file) for file in (tmp_path / name).glob("training/averages/*")}

    calm = run("calm", max_steps=10)
    assert sorted(calm) == [f"step-{n:08d}-{length}.safetensors" for n in (4, 8, 10) for length in LENGTHS]
    assert run("stopped", max_steps=7).keys() == {
        f"step-{n:08d}-{length}.safetensors" for n in (4, 7) for length in LENGTHS
    }
    again = run("stopped", max_steps=10)
    assert all(torch.equal(again[name]["slope"], calm[name]["slope"]) for name in calm)
    without = go(TrainingRun(settings(tmp_path / "without", max_steps=10), Line()))
    with_them = TrainingRun(settings(tmp_path / "calm", ema_snapshots=4, max_steps=10), Line())
    assert torch.equal(without.objective.slope, with_them.objective.slope)  # training is as it was
    assert torch.equal(without.learner.average.weights[0], with_them.learner.average.weights[0])
    with pytest.raises(ValueError, match="ema_snapshots was 4, now 0"):
        TrainingRun(settings(tmp_path / "calm", max_steps=10), Line())


def train(pictures: Path, output: Path, **changes: Any) -> Path:
    values = {**DENOISER, "data": str(pictures), "autoencoder": "pixels", "condition": "none", "max_steps": 6}
    values |= {"ema_snapshots": 2, "learning_rate": 1e-2, "sample_every": 6, "ema_decay": 0.0, **changes}
    return train_denoiser(DenoiserSettings.load(None, {**values, "output": str(output)}))


@pytest.fixture
def finished(pictures: Path, tmp_path: Path) -> Path:
    return train(pictures, tmp_path / "run")


def averages_in(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in (run / "training" / "averages").iterdir()}


@pytest.mark.slow
@forks
def test_kills_change_no_average_and_two_processes_keep_the_same(pictures: Path, tmp_path: Path) -> None:
    def work(name: str, size: int = 4) -> None:
        changes = {"max_steps": 20, "checkpoint_every": 3, "learning_rate": 1e-3, "batch_size": size}
        train(pictures, tmp_path / name, **changes)

    log = tmp_path / "log.txt"
    calm_and_killed(work, log, kills=3, seed=1)
    live(lambda: work("two", 2), log, processes=2)
    calm, killed, two = (averages_in(tmp_path / name) for name in ("calm", "killed", "two"))
    assert calm.keys() == killed.keys() == two.keys()
    for file, tensors in calm.items():
        for name, tensor in tensors.items():
            assert torch.equal(killed[file][name], tensor)
            torch.testing.assert_close(two[file][name], tensor, atol=2e-4, rtol=1e-3)


def test_a_model_of_another_length(finished: Path, tmp_path: Path) -> None:
    before = sorted(path for path in finished.rglob("*"))
    file = "unet/diffusion_pytorch_model.safetensors"
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(finished), "--length", "0.1", "-o", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    found, last = load_file(tmp_path / "new" / file), load_file(finished / file)
    snapshot = load_file(finished / "training" / "averages" / "step-00000006-0.1.safetensors")
    assert found.keys() == last.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, snapshot[f"denoiser.{name}"], atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(found[name], last[name]) for name in last)
    peer = diffusers.DDIMPipeline.from_pretrained(tmp_path / "new")
    assert peer(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    average(finished, 0.1, tmp_path / "earlier", step=4)
    earlier = load_file(finished / "training" / "averages" / "step-00000004-0.1.safetensors")
    name = "conv_in.weight"
    torch.testing.assert_close(
        load_file(tmp_path / "earlier" / file)[name], earlier[f"denoiser.{name}"], atol=1e-5, rtol=1e-4
    )
    assert sorted(path for path in finished.rglob("*")) == before
    assert not (tmp_path / "new" / "training").exists()
    assert "samples.png" in (finished / "README.md").read_text()
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert "# earlier\n" in card
    assert "in 6 optimizer steps. Its weights are an average over 0.1 of the first 4 of these steps" in card
    assert f'from_pretrained("{called(tmp_path / "earlier", None)}")' in card
    assert "## Settings" in card
    assert not any(told in card for told in ("samples.png", "## Figures", "val_loss |"))
    assert not (tmp_path / "earlier" / "samples.png").exists()

    for length, output, step, message in (
        (0.4, "no", None, "a length of 0.4 cannot be"),
        (0.1, "no", 3, "--step 3: averages were kept at 2, 4, 6"),
        (0.1, "run/inside", None, "is inside the run"),
    ):
        with pytest.raises(ValueError, match=message):
            average(finished, length, tmp_path / output, step)
    with pytest.raises(FileExistsError, match="exists; choose another --output"):
        average(finished, 0.1, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="no averages there; a training with ema_snapshots=100"):
        average(tmp_path / "new", 0.1, tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="there is no such folder; name the --output of a training"):
        average(tmp_path / "none", 0.1, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["cut", "header", "length", "other"])
def test_averages_that_are_damaged_or_of_another_model(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "training" / "averages"
    folder.mkdir(parents=True)
    file, weight = folder / "step-00000002-0.1.safetensors", {"denoiser.w": torch.ones(2)}
    (tmp_path / "run" / "config.json").write_text(json.dumps({}))
    save_file({"w": torch.ones(3)}, tmp_path / "run" / "diffusion_pytorch_model.safetensors")
    header = {"updates": "2", "length": "0.1"}
    save_file(weight, file, {"length": {"length": "nan", "updates": "2"}, "header": {}}.get(kind, header))
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    message = {
        "cut": "step-00000002-0.1.safetensors",
        "header": "does not say of which length",
        "length": "a length of nan cannot be",
    }
    with pytest.raises(ValueError, match=message.get(kind, "0 files of the model have all 1 weights")):
        average(tmp_path / "run", 0.1, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    if kind == "other":
        assert len(kept_averages(tmp_path / "run")) == 1
