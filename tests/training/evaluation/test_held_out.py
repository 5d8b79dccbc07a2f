"""Held-out pictures, and the loss on them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from accelerate import Accelerator
from lives import forks, live
from tiny import UNET
from torch import nn

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion import GaussianDiffusion
from latentdiff.models import UNet2DConditionModel
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.data import NoPicturesError
from latentdiff.training.data.load import hold_out, prepare_splits
from latentdiff.training.evaluation.held_out import HeldOutLoss, held_out_pictures
from latentdiff.training.objectives.diffusion import DenoiserObjective
from latentdiff.training.objectives.objective import Result
from latentdiff.training.settings import AutoencoderSettings, HeldOutSettings

PROCESS = GaussianDiffusion("scaled_linear", prediction_type="v_prediction", zero_terminal_snr=True)


def make_objective() -> DenoiserObjective:
    torch.manual_seed(0)
    return DenoiserObjective(UNet2DConditionModel(**UNET, dropout=0.3), PROCESS, 5.0)


def make_batches(timesteps: list[list[int]]) -> list[DiffusionBatch]:
    generator = torch.Generator().manual_seed(1)
    return [
        DiffusionBatch(
            latents=torch.randn(len(t), 4, 8, 8, generator=generator),
            noise=torch.randn(len(t), 4, 8, 8, generator=generator),
            draws=(torch.tensor(t, dtype=torch.float64) + 0.5) / 1000,
            condition=Conditioning(torch.randn(len(t), 5, 16, generator=generator)),
            loss_weight=torch.full((len(t),), 0.25),
            names=tuple(f"{step}.png" for step in t),
        )
        for t in timesteps
    ]


BATCHES = make_batches([[0, 249, 250], [999, 500], [749, 750, 100, 600], [499]])


def test_losses_are_plain_and_given_by_band() -> None:
    objective = make_objective()
    figures = HeldOutLoss(PROCESS, bands=4)(objective, BATCHES)
    plain = DenoiserObjective(objective.denoiser, PROCESS).eval()
    bands: dict[int, list[float]] = {}
    for batch in BATCHES:
        timesteps = batch.times(PROCESS)
        with torch.no_grad():
            losses = plain.per_sample(replace(batch, loss_weight=torch.ones(len(timesteps))), timesteps).tolist()
        for step, loss in zip(timesteps.tolist(), losses, strict=True):
            bands.setdefault(step // 250, []).append(loss)
    everything = [loss for losses in bands.values() for loss in losses]
    expected = {f"val_loss_{250 * i}_{250 * i + 249}": sum(bands[i]) / len(bands[i]) for i in range(4)}
    assert figures == pytest.approx({"val_loss": sum(everything) / 10, **expected})
    assert list(figures) == ["val_loss", "val_loss_0_249", "val_loss_250_499", "val_loss_500_749", "val_loss_750_999"]


def test_measuring_leaves_no_trace() -> None:
    objective, measure = make_objective().train(), HeldOutLoss(PROCESS)
    objective.denoiser.mid_block.eval()
    modes = [module.training for module in objective.modules()]
    state = torch.get_rng_state()
    first = measure(objective, BATCHES)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in objective.modules()] == modes
    assert measure(objective, BATCHES) == first
    assert all(p.grad is None for p in objective.parameters())


def test_modes_come_back_after_an_error() -> None:
    objective = make_objective().train()
    broken = [replace(BATCHES[0], latents=torch.zeros(3, 5, 8, 8))]
    with pytest.raises(RuntimeError):
        HeldOutLoss(PROCESS)(objective, broken)
    assert all(module.training for module in objective.modules())


def test_bands_need_not_be_equal_nor_full() -> None:
    figures = HeldOutLoss(GaussianDiffusion(num_timesteps=1000), bands=3)(make_objective(), make_batches([[332, 999]]))
    assert set(figures) == {"val_loss", "val_loss_0_332", "val_loss_666_999"}
    assert HeldOutLoss(PROCESS)(make_objective(), []) == {}
    with pytest.raises(ValueError, match=r"bands must lie in \[1, 10\], not 11"):
        HeldOutLoss(GaussianDiffusion(num_timesteps=10), bands=11)


class Buffered(nn.Module):
    """An objective with a buffer, which makes DistributedDataParallel speak to the others at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.objective = make_objective()
        self.register_buffer("nothing", torch.zeros(1))

    def forward(self, batch: DiffusionBatch, held_out: bool = False) -> Result:
        return self.objective(batch, held_out)


@pytest.mark.slow
@forks
@pytest.mark.parametrize("count", [4, 3, 1])
def test_two_processes_measure_what_one_does(count: int, tmp_path: Path) -> None:
    def measure(name: str) -> None:
        accelerator = Accelerator(cpu=True)
        objective = accelerator.prepare(Buffered())
        figures = HeldOutLoss(PROCESS)(objective, BATCHES[:count], accelerator)
        (tmp_path / f"{name}-{accelerator.process_index}.json").write_text(json.dumps(figures))
        accelerator.end_training()

    log = tmp_path / "log.txt"
    live(lambda: measure("one"), log)
    live(lambda: measure("two"), log, processes=2)
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one-0", "two-0", "two-1"))
    assert first == second
    assert first == pytest.approx(one, rel=1e-6)


def test_pictures_that_a_table_names_elsewhere(tmp_path: Path) -> None:
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    for folder in (elsewhere, data):
        folder.mkdir()
    (elsewhere / "a.png").write_bytes(hostile.encode(hostile.noise(0)))
    row = {"file_name": "../elsewhere/a.png", "text": "x", "split": "val"}
    (data / "metadata.jsonl").write_text(json.dumps(row))
    settings = HeldOutSettings(model="emoji", data=str(data))
    with pytest.raises(ValueError, match="leaves the folder"):
        held_out_pictures(settings, tmp_path / "out")
    allowed = HeldOutSettings(model="emoji", data=str(data), picture_folder=str(elsewhere))
    (picture,) = held_out_pictures(allowed, tmp_path / "out")[0]
    assert picture.size == (48, 40)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Sixty pictures that name no split, in two classes."""
    for i in range(60):
        file = tmp_path / "album" / ("cat" if i % 2 else "dog") / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(hostile.encode(hostile.noise(i)))
    return tmp_path / "album"


def splits(data: Path, **changes: Any) -> tuple[list[str], list[str]]:
    """Names in both splits."""
    settings = AutoencoderSettings(data=str(data), output=str(data.parent / "out"), **changes)
    kept, held_out = prepare_splits(settings, "class")
    return [Path(p.name).name for p in kept], [Path(p.name).name for p in held_out]


def test_some_are_held_out_by_their_content(album: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "latentdiff")
    kept, held_out = splits(album, held_out_share=0.2)
    assert f"{len(kept)} pictures to train on, {len(held_out)} held out to measure on" in caplog.text
    assert "held out by their content" in caplog.text
    assert 4 <= len(held_out) <= 20
    assert sorted(kept + held_out) == [f"{i:02}.png" for i in range(60)]
    for i in range(60, 90):  # others come, and a copy of one that is held out
        (album / "cat" / f"{i}.png").write_bytes(hostile.encode(hostile.noise(i)))
    one = next(album.rglob(held_out[0]))
    (one.parent / "copy.png").write_bytes(one.read_bytes())
    more = splits(album, held_out_share=0.2)[1]
    assert {*held_out, "copy.png"} <= set(more)
    assert not set(kept) & set(more)
    assert set(splits(album, held_out_share=0.1)[1]) < set(more)
    assert splits(album, held_out_share=0)[1] == []


def test_few_pictures_and_classes_are_not_torn_apart(album: Path) -> None:
    for file in sorted(album.rglob("*.png"))[:21]:
        file.unlink()
    assert splits(album, held_out_share=0.9)[1] == []  # 39
    pictures = prepare_splits(AutoencoderSettings(data=str(album), output=str(album.parent / "out")), "class")[0]
    many = [replace(picture, digest=f"{i:08x}") for i, picture in enumerate(pictures * 2)]  # all of them low
    assert hold_out(many, 0.5, "class")[1] == []
    assert len(hold_out(many, 0.5, "text")[1]) == len(many)


def test_what_training_held_out_is_evaluated_on(album: Path, tmp_path: Path) -> None:
    expected = splits(album)[1]
    model = tmp_path / "model"
    (model / "training").mkdir(parents=True)
    given = {"model": str(model), "data": str(album), "output": str(tmp_path / "figures")}
    settings = HeldOutSettings(**given)
    found = held_out_pictures(settings, tmp_path / "figures", "class")[0]
    assert [Path(picture.name).name for picture in found] == expected
    (model / "training" / "settings.yaml").write_text("held_out_share: 0.3\n")
    found = held_out_pictures(settings, tmp_path / "figures", "class")[0]
    assert [Path(picture.name).name for picture in found] == splits(album, held_out_share=0.3)[1]
    (model / "training" / "settings.yaml").write_text("seed: 1\n")  # an older run's, which held none out
    with pytest.raises(NoPicturesError, match="a folder 'validation' beside 'train', or a column 'split'; training"):
        held_out_pictures(settings, tmp_path / "figures", "class")
