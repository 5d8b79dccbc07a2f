"""``evaluate`` and ``likelihood`` of models whose denoiser is a transformer, and of SDXL's."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_sdxl import tiny_sdxl
from tiny_transformers import dit_folder, pixart_folder
from typer.testing import CliRunner

from latentdiff.cli import application


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(application(), [str(argument) for argument in arguments])


@pytest.fixture
def numbered(pictures: Path) -> Path:
    """The pictures as of a class of the model."""
    file = pictures / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({**row, "text": "item 3"}) for row in rows))
    return pictures


@pytest.mark.parametrize("kind", ["pixart", "dit", "sdxl"])
def test_they_are_evaluated(numbered: Path, tmp_path: Path, kind: str) -> None:
    if kind == "sdxl":
        tiny_sdxl().save_pretrained(model := tmp_path / "model")
    else:
        model = pixart_folder(tmp_path / "model", "bert") if kind == "pixart" else dit_folder(tmp_path / "model")
    options = ("--steps", "2", "--split", "train", "--extractor", "autoencoder")
    found = run("evaluate", model, "--data", numbered, "--output", tmp_path / "out", *options)
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert math.isfinite(report["metrics"]["kernel_distance"])


def test_a_dit_has_a_likelihood_and_a_pixart_none(numbered: Path, tmp_path: Path) -> None:
    dit_folder(tmp_path / "dit")
    bits = []
    for variance in ("fixed_small", "learned_range"):
        options = ("--steps", "4", "--split", "train", "--variance", variance, "--output", tmp_path / variance)
        found = run("likelihood", tmp_path / "dit", "--data", numbered, *options)
        assert found.exit_code == 0, found.output
        bits.append(json.loads((tmp_path / variance / "likelihood.json").read_text())["bits_per_dimension"])
    assert all(map(math.isfinite, bits))
    assert bits[0] != bits[1]
    pixart_folder(tmp_path / "pixart", "bert")
    tiny_sdxl().save_pretrained(tmp_path / "sdxl")
    for name in ("pixart", "sdxl"):
        found = run("likelihood", tmp_path / name, "--data", numbered)
        assert "is no model without text" in str(found.exception)
