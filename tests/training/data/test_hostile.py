"""Damaged and hostile inputs: no good picture is lost, each bad one is named, and nothing on the disk changes."""

from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import torch

from latentdiff.terminal import printable
from latentdiff.training.data import prepare_pictures, read_pixels
from latentdiff.training.data.doctor import examine_source
from latentdiff.training.settings import AutoencoderSettings, DoctorSettings

Make = Callable[[Path], tuple[Path, list[str], list[str]]]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("make", [hostile.hostile_folder, hostile.hostile_beside, hostile.hostile_csv])
def test_doctor(make: Make, tmp_path: Path) -> None:
    folder, good, bad = make(tmp_path / "data")
    before = hostile.state(tmp_path / "data")
    report = examine_source(DoctorSettings(data=str(folder)), manifest=tmp_path / "manifest.jsonl")
    assert sorted(entry.name for entry in report.entries) == sorted(good)
    for name in bad:
        found = [f for f in report.refused if f.name == name or f.name.startswith(f"{name} (")]
        assert len(found) == 1, f"{name}: {found}"
    assert len(report.refused) == len(bad)
    assert all(printable(line) == line for line in report.lines())
    assert hostile.state(tmp_path / "data") == before


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_training_gets_the_good_ones(tmp_path: Path) -> None:
    folder, good, bad = hostile.hostile_folder(tmp_path / "data")
    assert len(bad) + len(list(hostile.unusual())) > 200
    settings = AutoencoderSettings(data=str(folder), output=str(tmp_path / "out"), max_bad_share=1.0)
    before = hostile.state(tmp_path / "data")
    pictures = prepare_pictures(settings)
    assert [p.name for p in pictures] == [str(folder / name) for name in good]
    for picture in pictures:
        pixels = read_pixels(picture, 24, 16)
        assert pixels.shape == (3, 16, 24)
        assert torch.isfinite(pixels).all()
        assert pixels.abs().max() <= 1
    with pytest.raises(ValueError, match=r"more than a share of 0\.1 "):
        prepare_pictures(settings.model_copy(update={"max_bad_share": 0.1}))
    assert hostile.state(tmp_path / "data") == before
