"""Reconstructions: figures with known values, the sheet, and what is said where something is missing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VAE, autoencoder_settings
from torch import Tensor, nn

from latentdiff.metrics import psnr
from latentdiff.metrics.lpips import BACKBONES, LPIPS
from latentdiff.models import AutoencoderKL, VQModel
from latentdiff.models.autoencoder import AutoencoderOutput
from latentdiff.models.bottlenecks import BottleneckOutput
from latentdiff.training.batch.batch_types import PixelBatch
from latentdiff.training.data import prepare_pictures
from latentdiff.training.evaluation.reconstruction import Reconstructions, sheet
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.autoencoder import AutoencoderObjective
from latentdiff.training.starting_networks import build_autoencoder

SIZE = 16


class Changed(nn.Module):
    """Gives pictures back, with `added` on every pixel. Its latents are every second pixel."""

    def __init__(self, added: float = 0.0) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.tensor(added))

    def forward(self, sample: Tensor, sample_posterior: bool = False) -> AutoencoderOutput:
        told = {"posterior_std": torch.tensor(0.5)}
        return AutoencoderOutput(sample + self.added, bottleneck=BottleneckOutput(sample[..., ::2, ::2], {}, told))


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A dozen pictures of noise, neither black nor white, half of them held out."""
    folder = tmp_path / "noise"
    for i in range(12):
        file = folder / ("train" if i < 6 else "validation") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(60, 190, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(values).save(file)
    rows = [
        {"file_name": f"{split}/{i}.png", "split": split}
        for i in range(12)
        for split in ["train" if i < 6 else "validation"]
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def made(noise: Path, tmp_path: Path) -> Callable[..., tuple[Reconstructions, TrainingRun]]:
    """A run that trains `model`, and the reconstructions of its held-out pictures."""

    def make(model: nn.Module, held_out: str = "validation", **changes: Any) -> tuple[Reconstructions, TrainingRun]:
        changes = {"resolution": SIZE, "batch_size": 4, "perceptual_network": "autoencoder", **changes}
        settings = autoencoder_settings(noise, tmp_path / "run", validation_extractor="autoencoder", **changes)
        pictures = prepare_pictures(settings, "train", condition="none")
        chosen = prepare_pictures(settings, held_out, condition="none")
        return Reconstructions(settings, chosen, pictures), TrainingRun(settings, nn.ModuleList([model]))

    return make


def last_row(run: TrainingRun) -> dict[str, float]:
    return json.loads((run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def test_a_perfect_autoencoder(made: Any) -> None:
    model = Changed()
    reconstructions, run = made(model)
    reconstructions.report(run, model)
    figures = run.figures
    of_latents = {"val_latent_mean", "val_latent_std", "val_posterior_std"}
    assert set(figures) == {"psnr", "ssim", "val_perceptual", "frechet", *of_latents}
    assert figures["psnr"] == pytest.approx(106.02, abs=0.01)
    assert figures["ssim"] == pytest.approx(1.0)
    assert figures["val_perceptual"] == 0
    assert figures["frechet"] == pytest.approx(0.0, abs=1e-6)
    assert figures["val_posterior_std"] == pytest.approx(0.5)
    latents = reconstructions.pixels[..., ::2, ::2].double()
    assert figures["val_latent_mean"] == pytest.approx(float(latents.mean()))
    assert figures["val_latent_std"] == pytest.approx(float(latents.std(correction=0)))
    assert last_row(run).items() >= figures.items()
    assert (run.folder / "samples" / "step-00000000.png").is_file()


def test_a_known_error(made: Any) -> None:
    """6 pictures in chunks of 4: what is averaged counts every picture alike."""
    model = Changed(0.1)
    reconstructions, run = made(model)
    assert reconstructions.pixels.shape == (6, 3, SIZE, SIZE)
    assert reconstructions.held_out
    reconstructions.report(run, model)
    assert run.figures["psnr"] == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-3)
    assert 0.9 < run.figures["ssim"] < 1
    far, near = dict(run.figures), Changed(0.02)
    reconstructions.report(run, near)
    for name in ("val_perceptual", "frechet"):
        assert 0 < run.figures[name] < far[name]


def test_codes_are_counted_over_all_pictures(made: Any) -> None:
    torch.manual_seed(3)
    model = VQModel(**VAE, num_vq_embeddings=64).eval()
    nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    reconstructions, run = made(model)
    reconstructions.report(run, model)
    with torch.no_grad():
        counts = np.unique(model.encode_to_indices(reconstructions.pixels).numpy(), return_counts=True)[1]
        expected = psnr(model(reconstructions.pixels).sample, reconstructions.pixels)
    shares = counts / counts.sum()
    assert len(counts) > 3
    assert run.figures["val_codes_used"] == pytest.approx(len(counts) / 64)
    assert run.figures["val_perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert run.figures["psnr"] == pytest.approx(expected, abs=1e-3)
    assert "val_latent_std" not in run.figures


def test_a_gaussian_autoencoder(made: Any) -> None:
    """Reconstructions are of the posterior's mean, so measuring twice gives the same."""
    model = AutoencoderKL(**VAE).eval()
    reconstructions, run = made(model)
    reconstructions.report(run, model)
    with torch.no_grad():
        output = model(reconstructions.pixels, sample_posterior=False)
    figures = dict(run.figures)
    assert figures["psnr"] == pytest.approx(psnr(output.sample, reconstructions.pixels), abs=1e-3)
    for name in ("latent_mean", "latent_std", "posterior_std"):
        assert figures[f"val_{name}"] == pytest.approx(float(output.bottleneck.statistics[name]), rel=1e-2)
    reconstructions.report(run, model)
    assert run.figures == figures


def test_no_figure_is_called_as_one_of_a_training_batch(made: Any) -> None:
    """They would share a curve in the trackers."""
    for kind in ("kl", "vq", "gumbel", "fsq"):
        settings = autoencoder_settings(Path("data"), Path("run"), kind=kind, perceptual_weight=1.0)
        objective = AutoencoderObjective(build_autoencoder(settings), settings)
        result = objective(PixelBatch(torch.zeros(2, 3, SIZE, SIZE)))
        model = objective.autoencoder.eval()
        reconstructions, run = made(model)
        reconstructions.report(run, model)
        recorded = {**result.figures, **objective.recent_figures()}
        assert recorded
        assert not run.figures.keys() & recorded.keys()


def test_published_names_are_for_published_networks(made: Any, tmp_path: Path) -> None:
    weights = {f"lin{i}.model.1.weight": torch.ones(1, width, 1, 1) for i, width in enumerate(BACKBONES["alex"].widths)}
    weights |= {name: torch.randn(w.shape) for name, w in LPIPS("alex").state_dict().items() if "lin" not in name}
    torch.save(weights, tmp_path / "lpips.pth")
    model = Changed(0.1)
    reconstructions, run = made(model, resolution=32, perceptual_network=f"lpips:{tmp_path}/lpips.pth")
    reconstructions.extractor.is_fid = True
    reconstructions.report(run, model)
    assert run.figures["lpips"] > 0
    assert run.figures["rfid"] > 0
    assert not run.figures.keys() & {"val_perceptual", "frechet"}


def test_only_so_many_pictures(made: Any) -> None:
    assert made(Changed(), validation_pictures=3)[0].pixels.shape[0] == 3


def test_small_pictures_have_no_ssim(made: Any) -> None:
    model = Changed()
    reconstructions, run = made(model, resolution=8)
    reconstructions.report(run, model)
    assert "ssim" not in run.figures
    assert "psnr" in run.figures


def test_what_is_missing_is_said(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = Changed()
    reconstructions, run = made(model, held_out="train", validation_pictures=1)  # the same pictures again
    assert "figures are of training pictures" in caplog.text
    assert "no Frechet distance of reconstructions" in caplog.text
    assert not reconstructions.held_out
    reconstructions.report(run, model)
    assert "frechet" not in run.figures
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        made(model, perceptual_network="lpips:none.pth")


def test_reconstructions_that_are_not_finite(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Changed(float("nan"))
    reconstructions, run = made(model)
    reconstructions.report(run, model)
    assert "6 of 6 reconstructions hold values that are not finite" in caplog.text
    assert run.figures == {"not_finite": 6}
    assert (run.folder / "samples" / "step-00000000.png").is_file()


def test_the_file(made: Any, tmp_path: Path) -> None:
    model = Changed(0.1)
    reconstructions, run = made(model)
    reconstructions.report(run, model)
    reconstructions.write(run, tmp_path / "model")
    found = json.loads((tmp_path / "model" / "evaluation.json").read_text(encoding="utf-8"))
    assert found.items() >= run.figures.items()
    assert (found["pictures"], found["held_out"], found["resolution"]) == (6, True, SIZE)
    assert "encoder of the autoencoder" in found["perceptual_network"]
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["evaluation.json"]


def test_the_sheet() -> None:
    """Ten pictures: rows of eight and two, each with what became of them, and how they differ."""
    originals = torch.zeros(10, 3, 4, 6)
    reconstructed = originals.clone()
    reconstructed[9, 0, 1, 2] = 0.1  # red, 4 times 0.1 of the 2 from black to white
    reconstructed[0, :, 3, 5] = -0.9  # more than can be shown
    found = np.asarray(sheet(originals, reconstructed))
    assert found.shape == (6 * (4 + 2) - 2, 8 * (6 + 2) - 2, 3)

    def tile(row: int, column: int) -> np.ndarray:
        return found[row * 6 : row * 6 + 4, column * 8 : column * 8 + 6]

    assert (tile(0, 0) == 128).all()
    assert tile(1, 0)[3, 5].tolist() == [13, 13, 13]
    assert tile(2, 0)[3, 5].tolist() == [255, 255, 255]
    assert (tile(2, 1) == 0).all()
    assert tile(4, 1)[1, 2].tolist() == [140, 128, 128]
    assert tile(5, 1)[1, 2].tolist() == [51, 0, 0]
    assert tile(5, 1).sum() == 51
    assert (tile(3, 2) == 255).all()
