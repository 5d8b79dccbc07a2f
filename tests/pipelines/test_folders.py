"""Pipelines as folders: to plain diffusers and back, and what is wrong with a folder."""

import json
import logging
import os
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

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel, UNet2DModel

DRAW = {"num_inference_steps": 4, "output_type": "np"}

PLAIN_DIFFUSERS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentdiff":
            raise ImportError("latentdiff is not here")

sys.meta_path.insert(0, Blocker())
import numpy as np, torch
from diffusers import DiffusionPipeline

for folder, output in zip(sys.argv[1::2], sys.argv[2::2]):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert {type(part).__module__.split(".")[0] for part in pipeline.components.values() if part is not None} == {
        "diffusers", "transformers"
    }
    latents = torch.from_numpy(np.load(output))
    np.save(output, pipeline("a red car", latents=latents, num_inference_steps=4, output_type="np").images)
assert "latentdiff" not in sys.modules
"""


def test_plain_diffusers_draws_the_same_without_us(pipeline: Any, latents: torch.Tensor, tmp_path: Path) -> None:
    pipeline.register_defaults(num_inference_steps=4)
    pipeline.save_pretrained(tmp_path / "full")
    expected = {"full": pipeline("a red car", latents=latents[:1], **DRAW).images}
    half = TextToImagePipeline.from_pretrained(tmp_path / "full", dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", max_shard_size="40KB")
    again = TextToImagePipeline.from_pretrained(tmp_path / "half")
    expected["half"] = again("a red car", latents=latents[:1], **DRAW).images
    arguments = []
    for name in expected:
        np.save(tmp_path / f"{name}.npy", latents[:1].numpy())
        arguments += [str(tmp_path / name), str(tmp_path / f"{name}.npy")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN_DIFFUSERS, *arguments], check=True)
    for name, picture in expected.items():
        assert np.abs(np.load(tmp_path / f"{name}.npy") - picture).max() < 1e-4


def test_the_index_names_diffusers_classes_only(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["safety_checker"] == [None, None]
    assert "_name_or_path" not in index
    assert "latentdiff" not in (folder / "model_index.json").read_text()


def test_a_saved_folder_does_not_say_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    TextToImagePipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(folder) not in file.read_text(encoding="utf-8")


def test_a_replaced_network_is_entered_as_diffusers_too(pipeline: Any, networks: Any) -> None:
    pipeline.unet = networks[0]["unet"]
    assert pipeline.config["unet"] == ("diffusers", "UNet2DConditionModel")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_loads_what_diffusers_saved(pair: Callable[..., Any], tmp_path: Path, variant: str | None) -> None:
    _, theirs = pair()
    theirs.save_pretrained(tmp_path, variant=variant)
    ours = TextToImagePipeline.from_pretrained(tmp_path, variant=variant)
    assert type(ours.unet) is UNet2DConditionModel
    assert type(ours.vae) is AutoencoderKL
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    pictures = [p("a red car", generator=g, **DRAW).images for p, g in zip((ours, theirs), generators, strict=True)]
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4


def test_the_only_variant_needs_no_name(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list(tmp_path.glob("half/unet/diffusion_pytorch_model.safetensors"))
    again = TextToImagePipeline.from_pretrained(tmp_path / "half")
    assert torch.equal(again.unet.conv_in.weight, pipeline.unet.conv_in.weight)


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_precision(folder: Path, option: str) -> None:
    half = TextToImagePipeline.from_pretrained(folder, **{option: torch.bfloat16})
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}
    assert np.isfinite(half("a red car", seed=0, **DRAW).images).all()


def test_a_variant_that_is_not_there_is_refused(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`variant=fp16`, but no such modeling files are available"):
        TextToImagePipeline.from_pretrained(tmp_path, variant="fp16")


def test_float32_unless_asked(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    TextToImagePipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "half")
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.float32}


def test_components_can_be_given(folder: Path, networks: Any) -> None:
    loaded = TextToImagePipeline.from_pretrained(folder, unet=networks[0]["unet"])
    assert loaded.unet is networks[0]["unet"]


def test_defaults_travel_with_the_folder(pipeline: Any, tmp_path: Path) -> None:
    assert pipeline.defaults == {"num_inference_steps": 50, "guidance_scale": 7.5}
    pipeline.register_defaults(num_inference_steps=3, guidance_scale=1.5)
    pipeline.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.defaults == {"num_inference_steps": 3, "guidance_scale": 1.5}
    loaded("a red car", seed=0)
    assert (loaded.num_timesteps, loaded.guidance_scale) == (3, 1.5)
    with pytest.raises(ValueError, match="strength"):
        loaded.register_defaults(strength=1)


def test_saving_again_replaces_weights_and_keeps_other_files(pipeline: Any, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "unet" / "notes.txt").write_text("mine")
    pipeline.save_pretrained(folder, variant="fp16")
    pipeline.save_pretrained(folder, max_shard_size="40KB")
    names = {file.name for file in (folder / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors" not in names
    assert {"diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.fp16.safetensors"} <= names
    assert (folder / "notes.txt").exists()
    assert "notes.txt" in names
    assert not list(folder.glob(".saving-*"))
    shards = [file.stat().st_size for file in (folder / "unet").glob("*-of-*.safetensors")]
    assert len(shards) > 1
    TextToImagePipeline.from_pretrained(folder)


def test_an_interrupted_save_leaves_the_old_folder(
    pipeline: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.unet, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        pipeline.save_pretrained(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_the_packaged_model_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentdiff.interchange.folders.WEIGHTS", folder.parent)
    folder.rename(folder.with_name("emoji"))
    assert type(TextToImagePipeline.from_pretrained().unet) is UNet2DConditionModel
    assert type(TextToImagePipeline.from_pretrained("emoji").unet) is UNet2DConditionModel


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; give a folder that holds a model_index"):
        TextToImagePipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not a pipeline folder"):
        TextToImagePipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(FileNotFoundError, match=r"not a pipeline folder: it holds one AutoencoderKL alone .* a whole"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_precisions_may_be_named(tmp_path: Path) -> None:
    tiny_pipeline("clip").save_pretrained(tmp_path)
    pipeline = TextToImagePipeline.from_pretrained(tmp_path, torch_dtype="float16")
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float16}
    each = {"unet": "torch.bfloat16", "default": torch.float32}
    assert TextToImagePipeline.from_pretrained(tmp_path, dtype=each).unet.dtype == torch.bfloat16
    for wrong in ("half precision", "nn", 16):
        with pytest.raises(ValueError, match="is no precision; give one of torch's"):
            TextToImagePipeline.from_pretrained(tmp_path, dtype=wrong)
    with pytest.raises(TypeError, match=r"unknown argument 'device'; load the pipeline, then \.to\('cuda'\)"):
        TextToImagePipeline.from_pretrained(tmp_path, device="cuda")


def test_a_hub_model_that_is_not_here_is_an_os_error() -> None:
    with pytest.raises(OSError, match="nobody/nothing"):
        TextToImagePipeline.from_pretrained("nobody/nothing")


def test_missing_component_is_named(folder: Path) -> None:
    (folder / "unet").rename(folder / "renamed")
    with pytest.raises(FileNotFoundError, match="the folder unet is missing"):
        TextToImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_truncated_weights_are_named(folder: Path, part: str) -> None:
    file = folder / f"{part}.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ValueError, match=rf"{file} is damaged: it has"):
        TextToImagePipeline.from_pretrained(folder)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    (folder / "unet" / weights).write_bytes((folder / "vae" / weights).read_bytes())
    with pytest.raises(ValueError, match=r"unet: the weights do not fit config\.json; \d+ are missing, such as "):
        TextToImagePipeline.from_pretrained(folder)


def test_another_kind_of_component_is_named(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="unet is a UNet2DModel; this pipeline takes UNet2DConditionModel"):
        TextToImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "options", [{"use_safetensors": False}, {"trust_remote_code": True}, {"device_map": "balanced"}]
)
def test_unsupported_options_raise(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TextToImagePipeline.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("name", "near"), [("engine", None), ("torch_type", "torch_dtype"), ("sheduler", "scheduler"), ("fp16", None)]
)
def test_unknown_options_raise(folder: Path, name: str, near: str | None) -> None:
    with pytest.raises(TypeError) as raised:
        TextToImagePipeline.from_pretrained(folder, **{name: "openvino"})
    hint = "" if near is None else f"; did you mean {near}?"
    assert str(raised.value) == f"TextToImagePipeline.from_pretrained: unknown argument {name!r}{hint}"


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TextToImagePipeline.from_pretrained(folder)


def test_pickles_are_not_written(pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "latentdiff.pipelines.storage.folder"):
        pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert "never as pickles" in caplog.text
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert not list(tmp_path.rglob("*.bin"))


def test_diffusers_class_is_the_one_we_name(folder: Path) -> None:
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(folder), diffusers.StableDiffusionPipeline)


def test_every_component_is_reported_when_it_is_loaded(folder: Path) -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log, keep = logging.getLogger("diffusers.pipelines.pipeline_utils"), Keep()
    before = log.level
    log.addHandler(keep)
    log.setLevel(logging.INFO)
    try:
        loaded = TextToImagePipeline.from_pretrained(folder)
    finally:
        log.removeHandler(keep)
        log.setLevel(before)
    for name, component in loaded.components.items():
        if component is not None:
            assert any(line.startswith(f"Loaded {name} as {type(component).__name__}") for line in lines), name


def test_our_networks_in_pipelines_of_diffusers(pipeline: Any, tmp_path: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.save_pretrained(tmp_path / "text")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "text")
    assert type(again.unet) is UNet2DConditionModel
    assert type(again.vae) is AutoencoderKL
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], weight)
    plain = UNet2DModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
    )
    diffusers.DDPMPipeline(plain, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "plain")
    assert type(diffusers.DDPMPipeline.from_pretrained(tmp_path / "plain").unet) is UNet2DModel


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", torch.device("cuda"), "mps"])
def test_a_device_that_is_not_here(wanted: str | torch.device) -> None:
    pipeline = tiny_pipeline()
    kind = torch.device(wanted).type
    if kind == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is here")
    message = rf"^this machine has no {kind} device that torch can use \(torch .*\); draw on 'cpu'"
    for ask in (
        lambda: pipeline.to(wanted),
        lambda: pipeline.to(device=wanted),
        lambda: pipeline.to(wanted, torch.half),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert (pipeline.device.type, pipeline.unet.dtype) == ("cpu", torch.float32)
    assert pipeline.to("cpu").to(torch.float32) is pipeline
