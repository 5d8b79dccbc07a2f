"""`generate` in a process of its own, where imports are put off, draws what it draws where all is loaded."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from tiny_codes import save_codes
from tiny_sdxl import tiny_refiner, tiny_sdxl
from tiny_transformers import dit_folder, pixart_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline("clip").save_pretrained(folder / "clip")
    base = tiny_sdxl()
    base.save_pretrained(folder / "sdxl")
    tiny_refiner(base).save_pretrained(folder / "refiner")
    dit_folder(folder / "dit")
    pixart_folder(folder / "pixart")
    save_codes(folder)
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(folder / "from.png")
    return folder


def drawn(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ["a red thing", "--model", "clip", "--image", "from.png", "--mask", "from.png"],
        ["a red thing", "--model", "sdxl", "--refiner", "refiner"],
        ["a red thing", "--model", "pixart"],
        ["--model", "dit", "--class", "thing 3"],
        ["a red thing", "--model", "words"],
    ],
    ids=lambda given: given[given.index("--model") + 1] + given[-1][:3],
)
def test_a_cold_drawing_is_the_same(
    folder: Path, given: list[str], run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    steps = [] if "words" in given else ["--steps", "2"]
    command = ["generate", *given, *steps, "--seed", "3", "--overwrite", "-o"]
    assert run(*command, "warm.png") == 0
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-m", "latentdiff", *command, "cold.png"], check=True, env=environment)
    assert (drawn(Path("cold.png")) == drawn(Path("warm.png"))).all()


@pytest.mark.slow
def test_a_runtime_makes_its_graphs_cold(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "latentdiff", "generate", "a red thing", "--model", str(folder / "clip")]
    subprocess.run([*command, "--runtime", "onnx", "--steps", "2", "-o", str(tmp_path / "a.png")], check=True)
    assert drawn(tmp_path / "a.png").std() > 1
