"""Runtimes behind the same call: what they draw is torch's picture; what they cannot is refused with a sentence."""

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline
from torch import nn

from latentdiff import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline, extras
from latentdiff.models.layers import Upsample2D
from latentdiff.pipelines.runtime import choice, quantize
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.engines import check_shapes, core, onnx_engine, without_telemetry
from latentdiff.pipelines.runtime.graphs import ChannelNorm, Doubling, openvino_model
from latentdiff.pipelines.runtime.places import cache_folder, folder_of
from latentdiff.pipelines.runtime.quantize import onnx_int8, without_pictures
from latentdiff.pipelines.storage import onnx as storage_onnx
from latentdiff.pipelines.storage.onnx import Part, decoder_part, write_part

NEEDS = {"openvino": "openvino", "onnx": "onnxruntime"}
CALL: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline."""
    folder = tmp_path_factory.mktemp("runtimes") / "model"
    tiny_pipeline("bert").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def graphs(models: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    """They are made once for all tests."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(models.parent / "cache"))


@pytest.fixture(params=["openvino", "onnx"])
def runtime(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(NEEDS[request.param])
    return request.param


def loaded(kind: Any, model: Path, **options: Any) -> Any:
    pipeline = kind.from_pretrained(model, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both(kind: Any, model: Path, runtime: str, **options: Any) -> tuple[Any, Any]:
    return loaded(kind, model), loaded(kind, model, runtime=runtime, **options)


@pytest.mark.slow  # graphs are made, which takes some ten seconds
def test_same_seeds_draw_the_same_pictures(models: Path, runtime: str) -> None:
    torchs, other = both(TextToImagePipeline, models, runtime)
    for call in (CALL, {**CALL, "guidance_scale": 1.0, "seed": 4}, {**CALL, "height": 10, "width": 14}):
        expected = torchs(["a red thing", "a blue cup"], **call).images
        np.testing.assert_allclose(other(["a red thing", "a blue cup"], **call).images, expected, atol=1e-4)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torchs, other = both(ImageToImagePipeline, models, runtime)
    drawn = [one("a red thing", image=picture, strength=0.9, **CALL).images for one in (torchs, other)]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-4)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    torchs, other = both(InpaintPipeline, models, runtime)
    drawn = [one("a red thing", image=picture, mask_image=mask, **CALL).images for one in (torchs, other)]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-4)


@pytest.mark.slow
def test_streams_previews_callbacks_and_threads(models: Path, runtime: str) -> None:
    torchs, other = both(TextToImagePipeline, models, runtime)
    for ours, theirs in zip(*(one.stream("a red thing", **CALL) for one in (torchs, other)), strict=True):
        torch.testing.assert_close(theirs.latents, ours.latents, atol=1e-4, rtol=0)
        apart = np.asarray(theirs.preview()[0], dtype=int) - np.asarray(ours.preview()[0], dtype=int)
        assert abs(apart).max() <= 2

    def halve(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] / 2, "prompt_embeds": tensors["prompt_embeds"] * 0.9}

    named = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    drawn = [one("a red thing", **named, **CALL).images for one in (torchs, other)]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-4)
    alone = [other("a red thing", **{**CALL, "seed": seed}).images for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda seed: other("a red thing", **{**CALL, "seed": seed}).images, range(6)))
    for one, same in zip(alone, together, strict=True):
        np.testing.assert_array_equal(same, one)


@pytest.mark.slow
def test_graphs_are_made_once_for_a_content(
    models: Path, runtime: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = loaded(TextToImagePipeline, models, runtime=runtime)
    caplog.clear()  # making them is said, if no test before this one did it
    with caplog.at_level(logging.WARNING):
        again = loaded(TextToImagePipeline, models, runtime=runtime)
    assert "Making graphs" not in caplog.text
    assert again.unet.folder == first.unet.folder == folder_of(models, Runtime(runtime))
    assert sum(1 for _ in again.unet.parameters()) == 0
    changed = TextToImagePipeline.from_pretrained(models)
    with torch.no_grad():
        changed.unet.conv_out.bias += 0.5
    changed.save_pretrained(tmp_path / "other")
    changed.set_progress_bar_config(disable=True)
    other = loaded(TextToImagePipeline, tmp_path / "other", runtime=runtime)
    assert other.unet.folder != first.unet.folder
    np.testing.assert_allclose(other("a", **CALL).images, changed("a", **CALL).images, atol=1e-4)
    assert [path.name for path in cache_folder().iterdir() if path.name.startswith((".saving", ".gone"))] == []


@pytest.mark.slow
def test_what_a_runtime_cannot_is_refused(models: Path, runtime: str, tmp_path: Path) -> None:
    pipeline = loaded(TextToImagePipeline, models, runtime=runtime)
    with pytest.raises(ValueError, match=r"cannot be saved: load it without runtime= for that"):
        pipeline.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"cannot be given LoRAs.*fuse_lora.*load what was saved with runtime="):
        pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    with pytest.raises(AttributeError, match=r"RuntimeUNet has no enable_freeu.*load the pipeline without runtime="):
        pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(ValueError, match=f"the runtime {runtime} computes on the processor, and not on meta"):
        pipeline.to("meta")
    with pytest.raises(ValueError, match="precision of a runtime is chosen when it is loaded"):
        pipeline.to(torch.bfloat16)
    with pytest.raises(ValueError, match="runtime= and unet= do not go together"):
        TextToImagePipeline.from_pretrained(models, runtime=runtime, unet=pipeline.unet)
    assert not list(tmp_path.iterdir())
    shared = ImageToImagePipeline.from_pipe(pipeline)
    assert shared.unet is pipeline.unet
    assert shared.vae is pipeline.vae


@pytest.mark.slow
def test_shape_of_every_call(models: Path, runtime: str) -> None:
    torchs, other = both(TextToImagePipeline, models, runtime, runtime_shape=(2, 16, 24))
    call = {**CALL, "height": 16, "width": 24}
    expected = torchs(["a red thing", "a cup"], **call).images
    for _ in range(2):  # the second is of what the first has compiled, and kept
        np.testing.assert_allclose(other(["a red thing", "a cup"], **call).images, expected, atol=1e-4)
        other = loaded(TextToImagePipeline, models, runtime=runtime, runtime_shape=(2, 16, 24))
    with pytest.raises(ValueError, match=r"loaded for 2 pictures of 24 x 16 pixels .* is asked for 16 x 16"):
        other(["a red thing", "a cup"], **{**call, "width": 16})
    with pytest.raises(ValueError, match="a batch of 1; load it with another runtime_shape"):
        other("a red thing", **{**call, "guidance_scale": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrower_weights(models: Path, runtime: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and (runtime == "onnx" or not choice.openvino_has("BF16")):
        pytest.skip("not computed here")
    torchs, other = both(TextToImagePipeline, models, runtime, dtype=dtype)
    drawn = [one("a red thing", **CALL).images for one in (torchs, other)]
    assert 0 < abs(drawn[1] - drawn[0]).max() < 0.05
    sizes = [sum(file.stat().st_size for file in other.unet.folder.rglob("*") if file.is_file())]
    sizes.append(sum(file.stat().st_size for file in models.glob("*/*.safetensors")))
    assert dtype == torch.bfloat16 or sizes[0] < 10 * sizes[1]


@pytest.mark.slow
def test_int8_states_its_error(models: Path, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("nncf")
    torchs, other = both(ImageToImagePipeline, models, runtime, dtype=torch.int8)  # calibrated from words alone
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    drawn = [one("a red thing", image=picture, strength=0.9, **CALL).images for one in (torchs, other)]
    assert 0 < abs(drawn[1] - drawn[0]).mean() < 0.05
    report = json.loads((other.unet.folder / "runtime.json").read_text())
    assert 0 < report["prediction_error"] < 0.2
    assert 0 < report["picture_difference"] < report["largest_picture_difference"] < 128
    assert report["precision"] == other.unet.runtime.precision == "int8"
    if runtime == "openvino":  # uneven activations have no range for all; the weights are int8 all the same
        graph = core().read_model(other.unet.folder / "unet" / "openvino_model.xml")
        uneven = [one for one in graph.get_ops() if ".ff.net.2/" in one.get_friendly_name()]
        products = [one for one in uneven if one.get_type_name() == "MatMul"]
        assert products
        assert all(one.input_value(0).get_node().get_type_name() != "FakeQuantize" for one in products)
        kinds = {str(one.get_element_type()) for one in graph.get_ops() if one.get_friendly_name().endswith("2.weight")}
        assert kinds == {"<Type: 'int8_t'>"}


@pytest.mark.slow
@pytest.mark.parametrize("most", [100, 10**9])
def test_int8_of_a_graph_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As a UNet of Stable Diffusion 1.5's size is; in int8 it may fit (second case), or not."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    monkeypatch.setattr(storage_onnx, "MAX_BYTES", 100)
    monkeypatch.setattr(quantize, "MAX_BYTES", most)
    network, given = nn.Conv2d(4, 32, 3, bias=False), {"sample": torch.randn(2, 4, 8, 8)}
    write_part("unet", Part(network, given, {"sample": {0: "batch"}}, ["out_sample"], {}), tmp_path / "unet", 18)
    file = tmp_path / "unet" / "model.onnx"
    assert {one.name for one in file.parent.iterdir()} == {"config.json", "model.onnx", "model.onnx.data"}
    onnx_int8(file, [{"sample": given["sample"].numpy()}])
    left = {"config.json", "model.onnx"} | ({"model.onnx.data"} if most == 100 else set())
    assert {one.name for one in file.parent.iterdir()} == left
    drawn = onnx_engine(file, "int8", 1)({"sample": given["sample"].numpy()})[0]
    expected = network(given["sample"]).detach().numpy()
    assert 0 < abs(drawn - expected).max() < 0.1


def test_int8_is_not_calibrated_from_pictures() -> None:
    pipeline = tiny_pipeline("bert", in_channels=9)
    with pytest.raises(ValueError, match="int8 is calibrated by drawing, which a InpaintPipeline does from pictures"):
        without_pictures(InpaintPipeline.from_pipe(pipeline))


def test_unknown_choices_are_refused(models: Path) -> None:
    load = TextToImagePipeline.from_pretrained
    with pytest.raises(ValueError, match="there is no runtime 'tensorrt'; choose from openvino, onnx"):
        load(models, runtime="tensorrt")
    with pytest.raises(ValueError, match=r"one dtype of torch.float32, .* torch.int8, not torch.float64"):
        load(models, runtime="onnx", dtype=torch.float64)
    with pytest.raises(ValueError, match="onnxruntime computes on no processor in bfloat16"):
        load(models, runtime="onnx", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="torch does not draw in int8; say runtime="):
        load(models, dtype=torch.int8)
    with pytest.raises(ValueError, match="runtime_shape is of a runtime"):
        load(models, runtime_shape=(1, 16, 16))
    with pytest.raises(ValueError, match="the runtime onnx computes on the processor; leave device_map out"):
        load(models, runtime="onnx", device_map="cuda")
    with pytest.raises(ValueError, match=r"runtime_shape is \(pictures, height, width\), not \(16, 16\)"):
        load(models, runtime="onnx", runtime_shape=(16, 16))


def test_missing_extra_and_processor_without_bfloat16(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    monkeypatch.setattr(choice, "openvino_has", lambda capability: False)
    with pytest.raises(ValueError, match="this processor does not compute in bfloat16"):
        TextToImagePipeline.from_pretrained(models, runtime="openvino", dtype=torch.bfloat16)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for name in NEEDS:
        with pytest.raises(ImportError, match=rf"the runtime {name} needs {name}.*pip install ('onnx>|'openvino>|-e)"):
            TextToImagePipeline.from_pretrained(models, runtime=name)


def test_precision_of_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    monkeypatch.setattr(choice, "openvino_has", lambda capability: True)
    parts = ("unet", "vae_decoder", "vae_encoder")
    int8, half = Runtime("openvino", "int8"), Runtime("openvino", "bfloat16")
    assert [int8.precision_of(part) for part in parts] == ["int8", "bfloat16", "float32"]
    assert [half.precision_of(part) for part in parts] == ["bfloat16"] * 3
    assert [Runtime("onnx", "int8").precision_of(part) for part in parts] == ["int8", "float32", "float32"]
    monkeypatch.setattr(choice, "openvino_has", lambda capability: False)
    assert [int8.precision_of(part) for part in parts] == ["int8", "float32", "float32"]


def test_threads_may_import_runtimes_at_once() -> None:
    inside, left = Event(), Event()

    def second() -> None:
        with without_telemetry():
            inside.set()
            left.wait(1)

    with ThreadPoolExecutor(1) as pool:
        with without_telemetry():
            other = pool.submit(second)
            inside.wait(0.05)
        left.set()
        other.result()
    assert sys.modules.get("openvino_telemetry", sys) is not None


def test_graphs_name_what_does_not_fit() -> None:
    inputs: dict[str, tuple[int | None, ...]] = {"sample": (2, 4, None, None), "timestep": (1,)}
    time = np.zeros(1)
    check_shapes(Path("a.xml"), inputs, {"sample": np.zeros((2, 4, 8, 12)), "timestep": time})
    with pytest.raises(ValueError, match=r"a.xml: .* made for sample of 2 x 4 x any x any, and 1 x 4 x 8 x 8"):
        check_shapes(Path("a.xml"), inputs, {"sample": np.zeros((1, 4, 8, 8)), "timestep": time})
    with pytest.raises(ValueError, match="the graph needs timestep; its inputs are sample, timestep"):
        check_shapes(Path("a.xml"), inputs, {"sample": np.zeros((2, 4, 8, 8))})
    with pytest.raises(ValueError, match="the graph has no input for class_labels"):
        check_shapes(Path("a.xml"), inputs, {"sample": np.zeros((2, 4, 8, 8)), "timestep": time, "class_labels": time})


@pytest.mark.slow  # OpenVINO is imported
def test_an_operation_that_openvino_does_not_know_is_named() -> None:
    pytest.importorskip("openvino")

    class Foreign(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(sample).real

    part = Part(Foreign(), {"sample": torch.randn(2, 4, 4)}, {"sample": {}}, ["out_sample"], {})
    with pytest.raises(ValueError, match=r"take over the unet: No conversion rule found for operations: .*eigvals"):
        openvino_model("unet", part)


def test_channel_norm_is_group_norm() -> None:
    torch.manual_seed(0)
    norm, x = nn.GroupNorm(4, 12, eps=1e-3), 3 + 2 * torch.randn(2, 12, 5, 7)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(ChannelNorm(norm)(x), norm(x), atol=2e-6, rtol=1e-5)


def test_doubling_is_upsampling() -> None:
    torch.manual_seed(0)
    upsample, x = Upsample2D(6), torch.randn(2, 6, 5, 7)
    doubling = Doubling(upsample)
    with torch.no_grad():
        expected = upsample.conv(nn.functional.interpolate(x, scale_factor=2.0))
        torch.testing.assert_close(doubling(x), expected, atol=2e-6, rtol=1e-5)
        odd = upsample.conv(nn.functional.interpolate(x, size=(9, 14)))
        torch.testing.assert_close(doubling(x, (9, 14)), odd, atol=2e-6, rtol=1e-5)


@pytest.mark.slow  # OpenVINO is imported
def test_openvino_doubles_by_one_transposed_convolution() -> None:
    pytest.importorskip("openvino")
    model = openvino_model("decoder", decoder_part(tiny_pipeline("bert")))
    kinds = [one.get_type_name() for one in model.get_ordered_ops()]
    assert "ConvolutionBackpropData" in kinds
    assert "Interpolate" not in kinds
