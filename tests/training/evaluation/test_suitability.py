"""Whether an autoencoder can hold pictures."""

import re
from pathlib import Path

import hostile
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
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
    assert "larger max_steps" in found.advice("m", own=True)  # train denoiser has no --model
    assert "--model" not in found.advice("m", own=True)


class Duller(Worse):
    """Gives a fifth of the contrast back; with `keeps_colours`, within squares of 8x8 pixels only."""

    keeps_colours = False

    def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:  # type: ignore[override]
        patches = F.interpolate(F.avg_pool2d(z, 8), scale_factor=8)
        return (z - 0.8 * (z - patches if self.keeps_colours else z),)


def test_little_better_than_an_eighth_and_with_other_colours(noise: list[CaptionedPicture]) -> None:
    found = examine_autoencoder(Codec(Duller()), noise, 32)
    assert found.shrunk + 1 < found.mean < found.shrunk + 3
    assert not found.suits
    assert found.colours == pytest.approx(26, abs=0.5)  # means of 64 values are 1/8 away from 0: 0.8 of it, of 2
    assert found.advice("m").startswith("m holds these pictures poorly: colours and detail will change")
    assert re.search(r"colours of whole patches are off by 1[23] of 255\.", found.advice("m"))


@pytest.mark.parametrize("contrast", [1.0, 0.2])
def test_little_better_than_an_eighth_with_the_same_colours(noise: list[CaptionedPicture], contrast: float) -> None:
    for picture in noise:
        with Image.open(picture.name) as image:
            image.convert("L").point(lambda value: round(127.5 + contrast * (value - 127.5))).save(picture.name)
    autoencoder = Duller()
    autoencoder.keeps_colours = True
    found = examine_autoencoder(Codec(autoencoder), noise, 32)
    assert found.shrunk + 1 < found.mean < found.shrunk + 3
    assert found.colours > 60
    assert found.suits == (contrast == 0.2)  # 22.1 dB
    if contrast == 1:  # 8.1 dB
        assert found.advice("m").startswith("m holds these pictures poorly: detail will change")
        assert re.search(r"colours of pixels are off by 10[0-3] of 255\.", found.advice("m"))


def test_without_pictures(noise: list[CaptionedPicture]) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        examine_autoencoder(Codec(Worse()), [], 32)
