"""Curves of runs as a picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff.training.recipes.curves import draw_curves, read_curve


def run(folder: Path, values: list[float]) -> Path:
    (folder / "training").mkdir(parents=True)
    rows = [{"step": 10 * i, "loss": 1.0} | ({"psnr": value} if value else {}) for i, value in enumerate(values)]
    (folder / "training/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_curves(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", [0, 10, 0, 20]), run(tmp_path / "other", [0, 20, 0, 10])
    assert read_curve(one, "psnr") == ([10, 30], [10, 20])
    with pytest.raises(FileNotFoundError, match=r"training/metrics\.jsonl: no such file"):
        read_curve(tmp_path, "loss")
    pytest.importorskip("matplotlib")
    pictures = []
    for runs in ([one], [one, other]):
        draw_curves(runs, ["loss", "psnr"], tmp_path / "curves.png")
        pictures.append(np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")))
    assert pictures[0].shape == pictures[1].shape == (374, 990, 3)
    assert (pictures[0] != pictures[1])[:, 495:].any()
    with pytest.raises(ValueError, match="no run has 'lpips'"):
        draw_curves([one], ["lpips"], tmp_path / "curves.png")
