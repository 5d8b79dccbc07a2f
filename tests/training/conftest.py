"""A folder of small captioned pictures, and what is trained on it."""

import json
from pathlib import Path

import pytest
from discs import save_discs


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve discs on white with metadata.jsonl, the last two of them for validation."""
    return save_discs(tmp_path / "pictures")


@pytest.fixture
def numbered(pictures: Path) -> Path:
    """The pictures as of two classes of a DiT with a thousand."""
    file = pictures / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, "text": "Item 3" if row["text"][1] == "red" else "7"} for row in rows]
    file.write_text("\n".join(map(json.dumps, rows)))
    return pictures


@pytest.fixture
def labelled(pictures: Path) -> Path:
    """The pictures with their colour as a class."""
    file = pictures / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({**row, "colour": row["text"][1]}) for row in rows))
    return pictures


@pytest.fixture
def text_encoder(tmp_path: Path) -> Path:
    """A folder with a tiny BERT and a tokenizer that knows letters."""
    from tiny import bert_parts  # heavy, and not every test needs it

    folder = tmp_path / "text"
    for name, part in bert_parts().items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture
def denoiser_settings(pictures: Path, text_encoder: Path, tmp_path: Path) -> dict[str, object]:
    """For a denoiser of a few weights, with an autoencoder of its own."""
    from tiny import DENOISER, autoencoder_settings

    from latentdiff.training.trainers.autoencoder import train_autoencoder

    autoencoder = train_autoencoder(autoencoder_settings(pictures, tmp_path / "autoencoder", max_steps=2))
    return {**DENOISER, "data": str(pictures), "autoencoder": str(autoencoder), "text_encoder": str(text_encoder)}
