"""Whether an autoencoder can hold pictures."""

from pathlib import Path

import hostile
import pytest
import torch
from torch import Tensor

from latentdiff.codec import Codec
from latentdiff.models.identity import IdentityAutoencoder
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.captioned_picture import FileReader
from latentdiff.training.evaluation.suitability import examine_autoencoder


class Worse(IdentityAutoencoder):
    """Gives pictures back with 0.5 towards grey on every pixel."""

    def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:  # type: ignore[override]
        return (z - 0.5 * z.sign(),)


@pytest.fixture
def noise(tmp_path: Path) -> list[CaptionedPicture]:
    """Twenty pictures in black and white, so that every pixel is 1 away from grey."""
    found = []
    for i in range(20):
        picture = hostile.noise(i, 32, 32).convert("1", dither=0)
        picture.save(tmp_path / f"{i}.png")
        file = str(tmp_path / f"{i}.png")
        found.append(CaptionedPicture(file, FileReader(file), ("noise",)))
    return found


def test_what_is_lost_is_measured(noise: list[CaptionedPicture]) -> None:
    found = examine_autoencoder(Codec(Worse()), noise, 32)
    assert found.psnr == pytest.approx([10 * torch.log10(torch.tensor(4 / 0.25)).item()] * 8)
    assert found.suits  # noise that is shrunk is grey, 1 away: 6 dB
    assert found.shrunk == pytest.approx(6, abs=0.5)
    assert found.advice("m") == ""
    assert found.names == [noise[i].name for i in (0, 2, 5, 7, 10, 12, 15, 17)]
    assert "of m gives 8 of these pictures back, at 32x32, with 12.0 dB PSNR; the worst" in found.figures("m")


def test_an_autoencoder_that_keeps_less_than_an_eighth(noise: list[CaptionedPicture]) -> None:
    class Grey(Worse):
        def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:  # type: ignore[override]
            return (0 * z,)

    found = examine_autoencoder(Codec(Grey()), noise, 32)
    assert not found.suits
    assert "an autoencoder of your own" in found.advice("m")


def test_without_pictures(noise: list[CaptionedPicture]) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        examine_autoencoder(Codec(Worse()), [], 32)
