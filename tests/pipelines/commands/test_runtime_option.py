"""``--runtime`` of the commands."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff.interchange.png import read_settings


@pytest.mark.slow
def test_command_draws_and_replays(
    model: str, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "red.png"
    words = ["generate", "a red thing", "--model", model, "-o", file, "--seed", 3]
    assert run(*words, "--runtime", "openvino") == 0
    record = read_settings(file)
    assert (record["runtime"], record["precision"]) == ("openvino", "float32")
    assert run("replay", file) == 0


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_converted_with_its_graphs_a_model_needs_no_more(
    model: str, run: Callable[..., int], shared_cache: Path, runtime: str
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
    assert run("convert", model, "with graphs", "--runtime", runtime) == 0
    shutil.move("with graphs", "elsewhere")
    for name, more in (("a.png", ["--runtime", runtime]), ("b.png", [])):
        assert run("generate", "a red", "--model", "elsewhere", "-o", name, "--seed", 1, *more) == 0
    assert not (shared_cache / "runtimes").exists()  # none were made to draw
    apart = np.asarray(Image.open("a.png"), dtype=int) - np.asarray(Image.open("b.png"), dtype=int)
    assert abs(apart).max() <= 2
    assert read_settings(Path("a.png"))["model_digest"] == read_settings(Path("b.png"))["model_digest"]


def test_graphs_are_put_into_folders_only(
    model: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        (["out.safetensors", "--runtime", "onnx"], "--runtime does nothing for a single file"),
        (["out", "--runtime", "onnx", "--to", "onnx"], "--runtime does nothing for --to onnx, which is for diffusers'"),
        (["out", "--runtime", "onnx", "--component", "unet"], "--runtime does nothing for the unet alone"),
        (["out", "--dtype", "int8"], "--dtype int8: weights are not saved in int8; say --runtime openvino or onnx"),
    ):
        assert run("convert", model, *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not list(Path.cwd().iterdir())


def test_commands_refuse_what_a_runtime_does_not_take(
    model: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for more, message in (
        (["--precision", "int8"], "torch does not draw in int8"),
        (["--runtime", "onnx", "--device", "cuda"], "--runtime onnx computes on the processor"),
    ):
        assert run("generate", "a red thing", "--model", model, *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
