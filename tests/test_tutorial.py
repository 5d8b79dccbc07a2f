"""The notebook in docs/ runs from its first cell to its last, and was left as it ran."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

NOTEBOOK = Path(__file__).parents[1] / "docs" / "diffusion_from_scratch.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(cells: list[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    """The names that all cells leave behind, the one with parameters replaced."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(re.findall(r"^(\w+) =", source, re.MULTILINE)) == set(parameters)
            names.update(parameters)
        else:
            exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    return names


@pytest.mark.parametrize("loss", ["l1", pytest.param("simple", marks=pytest.mark.slow)])
def test_it_runs(cells: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str) -> None:
    folder = tmp_path / "cars"
    for i in range(12):  # a folder for each kind, as StanfordCars has it
        image = Image.new("RGB", (40, 24), "white")
        ImageDraw.Draw(image).rectangle((4 + i, 8, 24 + i, 18), fill=("red", "blue")[i % 2])
        (folder / f"kind {i % 3}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"kind {i % 3}" / f"{i}.png")
    torch.manual_seed(0)
    values = {"FOLDER": str(folder), "ONLY": None, "SIZE": 16, "STEPS": 40, "BATCH": 8, "LOSS": loss}
    names = run(cells, values)
    assert names["pictures"].shape == (12, 3, 16, 16)
    assert names["drawn"].shape == (32, 3, 16, 16)
    assert torch.isfinite(names["drawn"]).all()
    assert not torch.equal(names["drawn"], names["flat"])
    assert [image.size for image in names["images"]] == [(16, 16)] * 16
    said = capsys.readouterr().out
    walked, at_once = (re.findall(rf"{name}: +mean (\S+), .* (\S+)", said)[0] for name in ("step by step", "at once"))
    assert [float(x) for x in walked] == pytest.approx([float(x) for x in at_once], abs=0.02)
    losses = [float(found) for found in re.findall(r"step \d+: loss (\S+),", said)]
    assert losses[-1] < losses[0]


def test_it_was_left_as_it_ran(cells: list[dict[str, Any]]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
