"""What needs a GPU: skipped without one; LATENTDIFF_TEST_DEVICE=cpu rehearses it on the processor."""

import os
from pathlib import Path

import pytest
import torch
from tiny import AUTOENCODER, tiny_pipeline

NAME = os.environ.get("LATENTDIFF_TEST_DEVICE", "cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = NAME != "cuda" or torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not there:
                item.add_marker(pytest.mark.skip(reason="no GPU; LATENTDIFF_TEST_DEVICE=cpu rehearses it"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(NAME)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the trainings here begin from: pictures, models, autoencoders and a text encoder."""
    from discs import save_discs
    from tiny import bert_parts
    from tiny_sdxl import tiny_sdxl

    from latentdiff.training.settings import AutoencoderSettings
    from latentdiff.training.trainers.autoencoder import train_autoencoder

    folder = tmp_path_factory.mktemp("gpu")
    save_discs(folder / "pictures", colour="{}")
    tiny_pipeline("clip").save_pretrained(folder / "model")
    tiny_pipeline().save_pretrained(folder / "bert")
    for name, part in bert_parts().items():
        part.save_pretrained(folder / "text" / name)
    tiny_sdxl().save_pretrained(folder / "sdxl")
    for name, kind in (("autoencoder", {}), ("vq", {"kind": "vq", "num_vq_embeddings": 16})):
        values = {**AUTOENCODER, "data": str(folder / "pictures"), "output": str(folder / name), "max_steps": 2, **kind}
        train_autoencoder(AutoencoderSettings.load(None, values))
    return folder
