"""``latentdiff models``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from latentdiff.interchange.packed import pack

Run = Callable[..., int]


def index(folder: Path, **changes: object) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_all_models(model: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, "hub/models--some--one/snapshots/abc")
    Path("hub/models--some--one/refs").mkdir()
    Path("hub/models--some--one/refs/main").write_text("abc")
    shutil.copytree(model, "runs/my owls")
    index(Path("runs/my owls"), _class_name="ClassConditionalPipeline", id2label={"0": "owl, bird"})
    shutil.copytree(model, "runs/any")
    index(Path("runs/any"), _class_name="DDPMPipeline", _generation_defaults={"num_inference_steps": 12})
    shutil.copytree(model, "runs/mask")
    index(Path("runs/mask"), _class_name="StableDiffusionInpaintPipeline")
    shutil.copytree(model, "runs/other")
    index(Path("runs/other"), _class_name="FluxPipeline\x1b[2J")
    shutil.copytree(model, "runs/.hidden")
    shutil.copytree(model, "runs/mask/training/model")
    Path("runs/broken").mkdir()
    Path("runs/broken/model_index.json").write_text("{")
    assert run("models", "runs") == 0
    said = capsys.readouterr().out
    assert "In the package:\n  emoji: TextToImagePipeline, " in said
    assert " MB, 128 x 128 pixels, 4 steps\n" in said
    assert "In the hub's cache:\n  some/one: TextToImagePipeline, " in said
    assert 'latentdiff generate "a red car" --model some/one\n' in said
    assert "latentdiff generate --model 'runs/my owls' --class owl -n 4\n" in said
    assert "  runs/any: UnconditionalPipeline, " in said
    assert " kB, 16 x 16 pixels, 12 steps\n      latentdiff generate --model runs/any -n 4\n" in said
    assert 'generate "a red car" --model runs/mask --image image.png --mask mask.png\n' in said
    assert "runs/other: FluxPipeline\\x1b[2J, " in said
    assert "there is no such pipeline here" in said
    assert "runs/broken: cannot be used: runs/broken/model_index.json is damaged: not JSON" in said
    assert "hidden" not in said
    assert "training" not in said


def test_no_models_but_the_packaged_one(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")] == ["In the package:"]
    assert run("models", "none") == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_single_files_are_models_too(model: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    assert run("convert", model, "runs/old.safetensors") == 0
    shutil.copytree(model, "textless")
    index(Path("textless"), _class_name="DDPMPipeline", _generation_defaults={"num_inference_steps": 12})
    pack(Path("textless"), Path("runs/any.safetensors"))
    shutil.copy("textless/unet/diffusion_pytorch_model.safetensors", "runs/network.safetensors")
    Path("runs/damaged.safetensors").write_bytes(b"\xff" * 20)
    capsys.readouterr()
    assert run("models", "runs") == 0
    said = capsys.readouterr().out.partition("In runs:\n")[2]
    assert "  runs/any.safetensors: UnconditionalPipeline, " in said
    assert " kB, 16 x 16 pixels, 12 steps\n      latentdiff generate --model runs/any.safetensors -n 4\n" in said
    assert "  runs/old.safetensors: TextToImagePipeline, " in said
    assert 'latentdiff generate "a red car" --model runs/old.safetensors\n' in said
    assert len(said.splitlines()) == 5
