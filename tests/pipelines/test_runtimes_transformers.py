"""Runtimes that draw with PixArt's and DiT's folders: torch's pictures, of any size, or of one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_transformers import dit_folder, pixart_folder

from latentdiff import ClassConditionalPipeline, ImageToImagePipeline, InpaintPipeline, TextToImagePipeline
from latentdiff.pipelines.runtime.graphs import denoiser_part
from latentdiff.pipelines.runtime.quantize import without_pictures

pytestmark = pytest.mark.slow  # graphs are made, which takes some ten seconds

NEEDS = {"openvino": "openvino", "onnx": "onnxruntime"}
CALL: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
WORDS = ["a red thing", "a cup"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runtimes")
    sized = pixart_folder(folder / "sized", "bert", use_additional_conditions=True)
    return {"pixart": pixart_folder(folder / "pixart", "bert"), "sized": sized, "dit": dit_folder(folder / "dit")}


@pytest.fixture(autouse=True)
def graphs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    """They are made once for all tests."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(folders["dit"].parent / "cache"))


@pytest.fixture(params=["openvino", "onnx"])
def runtime(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(NEEDS[request.param])
    return request.param


def both(kind: Any, folder: Path, runtime: str, **options: Any) -> list[Any]:
    pipelines = [kind.from_pretrained(folder), kind.from_pretrained(folder, runtime=runtime, **options)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


@pytest.mark.parametrize("kind", ["sized", "dit"])
def test_same_seeds_draw_the_same_pictures(folders: dict[str, Path], runtime: str, kind: str) -> None:
    task: Any = ClassConditionalPipeline if kind == "dit" else TextToImagePipeline
    torchs, other = both(task, folders[kind], runtime)
    what: Any = ["item 3", 7] if kind == "dit" else WORDS
    for call in (CALL, {**CALL, "guidance_scale": 1.0, "seed": 4}, {**CALL, "height": 12, "width": 20}):
        np.testing.assert_allclose(other(what, **call).images, torchs(what, **call).images, atol=1e-4)
    few = other(what[:1], num_images_per_class=3, **CALL) if kind == "dit" else other("a cup", **CALL)
    assert np.isfinite(few.images).all()


def test_pictures_to_start_from(folders: dict[str, Path], runtime: str) -> None:
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    for task, given in ((ImageToImagePipeline, {"strength": 0.9}), (InpaintPipeline, {"mask_image": mask})):
        drawn = [
            one("a red thing", image=picture, **given, **CALL).images for one in both(task, folders["sized"], runtime)
        ]
        np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-4)


def test_one_shape(folders: dict[str, Path], runtime: str) -> None:
    torchs, other = both(TextToImagePipeline, folders["sized"], runtime, runtime_shape=(2, 16, 24))
    call = {**CALL, "height": 16, "width": 24}
    np.testing.assert_allclose(other(WORDS, **call).images, torchs(WORDS, **call).images, atol=1e-4)
    with pytest.raises(ValueError, match=r"loaded for 2 pictures of 24 x 16 pixels .* is asked for 16 x 16"):
        other(WORDS, **{**call, "width": 16})


@pytest.mark.parametrize(("kind", "runtime"), [("pixart", "openvino"), ("dit", "onnx")])
def test_int8_states_its_error(folders: dict[str, Path], runtime: str, kind: str) -> None:
    pytest.importorskip("nncf" if runtime == "openvino" else "onnxruntime")
    task: Any = ClassConditionalPipeline if kind == "dit" else TextToImagePipeline
    torchs, other = both(task, folders[kind], runtime, dtype=torch.int8)
    drawn = [one([7] if kind == "dit" else WORDS, **CALL).images for one in (torchs, other)]
    assert 0 < abs(drawn[1] - drawn[0]).mean() < 0.1
    assert (other.transformer.folder / "runtime.json").is_file()


def test_int8_is_calibrated_from_words_alone(folders: dict[str, Path]) -> None:
    pipeline = ImageToImagePipeline.from_pretrained(folders["pixart"])
    plain = without_pictures(pipeline)
    assert type(plain).__name__ == "PixArtTextToImagePipeline"
    assert plain.transformer is pipeline.transformer  # type: ignore[attr-defined]


def test_a_graph_takes_what_a_call_gives(folders: dict[str, Path]) -> None:
    given = {name: set(denoiser_part(model_in(folder)).inputs) for name, folder in folders.items()}
    text = {"sample", "timestep", "encoder_hidden_states", "encoder_attention_mask"}
    assert given == {
        "pixart": text,
        "sized": text | {"resolution", "aspect_ratio"},
        "dit": {"sample", "timestep", "class_labels"},
    }


def model_in(folder: Path) -> Any:
    kind: Any = ClassConditionalPipeline if folder.name == "dit" else TextToImagePipeline
    return kind.from_pretrained(folder).unet
