"""Drawing by a runtime without torch: what torch draws, in a program that never imports it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.light.pipeline import LightPipeline, TorchNeededError, open_light
from latentdiff.pipelines.runtime.places import folder_of
from latentdiff.pipelines.runtime.prepared import prepare

NOT_IMPORTED = ("torch", "transformers", "diffusers", "accelerate", "peft", "torchvision", "scipy", "sympy")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light") / "model"
    pipeline = tiny_pipeline("bert")
    pipeline.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    pipeline.register_defaults(num_inference_steps=3, guidance_scale=3.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def graphs(model: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    """They are made once for all tests."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(model.parent / "cache"))


def opened(model: Path, runtime: str, usual: Callable[[], Any] = lambda: None) -> LightPipeline:
    """With its graphs made if they are not there."""
    choice = Runtime(runtime)
    light = open_light(model, choice, usual)
    if light is None:
        prepare(TextToImagePipeline.from_pretrained(model), choice, folder_of(model, choice))
        light = open_light(model, choice, usual)
    assert light is not None
    return light


@pytest.mark.slow  # graphs are made
@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_it_draws_what_torch_draws(model: Path, runtime: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
    light, usual = opened(model, runtime), TextToImagePipeline.from_pretrained(model)
    usual.set_progress_bar_config(disable=True)
    for scheduler in (
        diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        diffusers.LCMScheduler(),
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    ):
        usual.scheduler = scheduler
        light.scheduler_class, light.scheduler_config = type(scheduler).__name__, dict(scheduler.config)
        for call in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "a blue cup", "num_inference_steps": 5}):
            prompts, seeds = ["a red thing", "a cup", "a red thing"], [3, 2**40, 4]
            drawn = [one(prompts, seed=seeds, **call).images for one in (light, usual)]
            apart = [np.asarray(a, dtype=int) - np.asarray(b, dtype=int) for a, b in zip(*drawn, strict=True)]
            assert abs(np.array(apart)).max() <= 1
    assert light.machine.torch == torch.__version__

    # What goes wrong is drawn, and told of, by torch
    light.usual = lambda: lambda prompts, **call: (prompts, call)
    light.decode = lambda arrays: [np.full((1, 3, 16, 16), np.nan)]  # type: ignore[assignment]
    prompts, call = light(["a cup"], seed=[1])
    assert prompts == ["a cup"]
    assert call == {
        **{"negative_prompt": None, "seed": [1], "height": 16, "width": 16},
        **{"num_inference_steps": 3, "guidance_scale": 3.0},
    }


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_a_drawing_imports_no_torch(model: Path, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
    opened(model, runtime)
    file = tmp_path / "a.png"
    words = ["generate", "a red thing", "-m", model, "--runtime", runtime, "--seed", 3, "-o", file]
    code = f"""
import sys
from latentdiff.cli import main
sys.argv = {["latentdiff", *map(str, words)]}
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*[name for name in {NOT_IMPORTED} if name in sys.modules], len(sys.modules))"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    *imported, count = said.splitlines()[-1].split()
    assert imported == []
    assert int(count) < (600 if runtime == "onnx" else 700)
    record = read_settings(file)
    assert record is not None
    assert (record["runtime"], record["scheduler"], record["num_inference_steps"]) == (runtime, "DDIMScheduler", 3)


@pytest.mark.slow
def test_what_needs_torch_is_left_to_it(model: Path) -> None:
    pytest.importorskip("onnxruntime")
    light = opened(model, "onnx")
    light.check_request(["a cup"], 16, 16, 4, "red")
    for request in (
        (["a red thing " * 9], None, None, None, None),  # what is cut is said
        (["a cup"], None, None, None, "a red thing " * 9),
        (["a cup"], 24, None, None, None),
        (["a cup"], None, None, 1001, None),
    ):
        with pytest.raises(TorchNeededError):
            light.check_request(*request)
    light.defaults = {"num_inference_steps": 4, "guidance_scale": 1.0}
    with pytest.raises(TorchNeededError, match="other steps than a distilled model was made for"):
        light.check_request(["a cup"], None, None, 5, None)
    with pytest.raises(TorchNeededError, match="guidance of a distilled model that was made for none"):
        light.check_request(["a cup"], None, None, 4, None, 7.0)


def test_without_graphs_it_is_left_to_torch(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert open_light(model, Runtime("onnx", "float16"), lambda: None) is None
    with pytest.raises(FileNotFoundError, match="is not a pipeline folder"):
        open_light(tmp_path, Runtime("onnx"), lambda: None)
