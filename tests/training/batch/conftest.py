"""Pictures with their digests, and an autoencoder of random weights."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from latentdiff import AutoencoderKL
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.data.captioned_picture import FileReader, View

Wanted = list[tuple[CaptionedPicture, View]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the children that tests fork: the number of threads changes the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture_of(file: Path) -> CaptionedPicture:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return CaptionedPicture(file.name, FileReader(str(file)), ("a thing",), digest=digest)


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    """Twelve pictures of noise, each in a view; two sizes."""
    (tmp_path / "noise").mkdir()
    views = [View(16, 16), View(24, 8, (0.0, 0.5)), View(16, 16, flip=True)]
    chosen = []
    for i in range(12):
        pixels = torch.randint(0, 256, (24, 28, 3), dtype=torch.uint8)
        file = tmp_path / "noise" / f"{i}.png"
        Image.fromarray(pixels.numpy()).save(file)
        chosen.append((picture_of(file), views[i % 3]))
    return chosen


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    return model.eval()


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)
