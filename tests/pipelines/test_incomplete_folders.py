"""Folders that lack something, or hold what is no number: refused, where they would draw garbage."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import draw, tiny_pipeline

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel, VQModel
from latentdiff.models import IdentityAutoencoder
from latentdiff.text import load_text_encoder

LOADERS = [TextToImagePipeline.from_pretrained, load_text_encoder]


@pytest.fixture(params=["clip", "bert"])
def folder(request: Any, tmp_path: Path) -> Path:
    pipeline = tiny_pipeline(request.param)
    pipeline.load_textual_inversion({"<cup>": torch.zeros(2, 16)})
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def change_weights(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """Returns the name of the first weight."""
    file = weights_of(folder, part)
    state = load_file(file)
    name = next(name for name in state if name.endswith("weight"))
    change(state)
    save_file(state, file, {"format": "pt"})
    return name


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("load", LOADERS)
def test_a_tokenizer_without_words(folder: Path, load: Any) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"model/tokenizer has no tokenizer that knows any words"):
        load(folder)


@pytest.mark.parametrize("load", LOADERS)
def test_a_tokenizer_that_may_read_otherwise_is_warned_of(
    folder: Path, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder)
    assert not caplog.messages
    (folder / "tokenizer/tokenizer_config.json").unlink()
    load(folder)
    assert any("model/tokenizer has no tokenizer_config.json" in message for message in caplog.messages)


@pytest.mark.parametrize("load", LOADERS)
def test_a_tokenizer_that_lacks_words_is_warned_of(folder: Path, load: Any, caplog: pytest.LogCaptureFixture) -> None:
    def grow(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if "token_embedding" in name or "word_embeddings" in name)
        state[name] = torch.cat([state[name]] * 2)

    rows = json.loads((folder / "text_encoder/config.json").read_text())["vocab_size"]
    change_weights(folder, "text_encoder", grow)
    change_json(folder / "text_encoder/config.json", vocab_size=2 * rows)
    load(folder)
    assert any(f"and its text encoder {2 * rows}: words may be missing" in message for message in caplog.messages)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_text_encoder_that_lacks_weights(
    folder: Path, load: Any, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    def drop(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if ".layers.0." in name or ".layer.0." in name][:count]:
            del state[name]

    change_weights(folder, "text_encoder", drop)
    with pytest.raises(ValueError, match=rf"text_encoder: the weights do not fit config.json; {count} are missing"):
        load(folder)
    assert caplog.text == ""  # transformers has a table of what it would fill with random values


def test_a_text_encoder_of_other_shapes(folder: Path) -> None:
    change_json(folder / "text_encoder/config.json", intermediate_size=48)
    with pytest.raises(ValueError, match=r"text_encoder: the weights do not fit config.json"):
        TextToImagePipeline.from_pretrained(folder)


def test_a_pooler_may_be_missing(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("bert")
    pipeline.save_pretrained(tmp_path)

    def drop(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.startswith("pooler.")]:
            del state[name]

    change_weights(tmp_path, "text_encoder", drop)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(draw(again), draw(pipeline), atol=0, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite(folder: Path, part: str, value: float) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.endswith("weight"))
        state[name].view(-1)[-1] = value

    name = change_weights(folder, part, spoil)
    with pytest.raises(ValueError, match=rf"^\S*model/{part}/?: 1 weights .* not finite .*, such as \S*{name[-10:]}"):
        TextToImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("vae/config.json", {"scaling_factor": math.nan}, r"vae/config.json: its scaling_factor is not a number"),
        ("vae/config.json", {"scaling_factor": math.inf}, r"scaling_factor=inf is not finite"),
        ("vae/config.json", {"scaling_factor": 0}, r"scaling_factor=0 is not supported; give a number other than 0"),
        ("vae/config.json", {"sample_size": "big"}, r"sample_size='big' is not a size"),
        ("unet/config.json", {"sample_size": "big"}, r"sample_size='big' is not a size"),
        ("unet/config.json", {"sample_size": [8, -8]}, r"sample_size=\[8, -8\] is not a size"),
        (
            "scheduler/scheduler_config.json",
            {"beta_end": math.nan},
            r"_config.json: its beta_end is not a num",
        ),
        ("scheduler/scheduler_config.json", {"beta_start": "0.1"}, r'_config.json: its beta_start is "0.1"; it should'),
        ("scheduler/scheduler_config.json", {"beta_end": None}, "its beta_end is null; it should be a number"),
        ("scheduler/scheduler_config.json", {"steps_offset": [1]}, r"its steps_offset is \[1\]; it should be a number"),
        ("scheduler/scheduler_config.json", {"beta_schedule": 3}, "its beta_schedule is 3; it should be a text"),
        ("scheduler/scheduler_config.json", {"clip_sample": "no"}, 'its clip_sample is "no"; it should be true or'),
        ("text_encoder/config.json", {"layer_norm_eps": math.nan}, r"its layer_norm_eps is not a number \(NaN\)"),
        ("model_index.json", {"_class_name": None}, r"model_index.json: its _class_name is None, not the name of a"),
        ("model_index.json", {"unet": "UNet2DConditionModel"}, r'its unet is "UNet2DConditionModel"; a component is'),
        ("model_index.json", {"unet": ["diffusers"]}, r'its unet is \["diffusers"\]; a component is named by'),
        ("model_index.json", {"vae": ["diffusers", 5]}, r'its vae is \["diffusers", 5\]; a component is named by'),
        ("model_index.json", {"scheduler": {}}, r"its scheduler is \{\}; a component is named by"),
    ],
)
def test_values_without_sense(tmp_path: Path, file: str, values: dict[str, Any], message: str) -> None:
    tiny_pipeline("bert").save_pretrained(tmp_path)
    change_json(tmp_path / file, **values)
    with pytest.raises(ValueError, match=message):
        TextToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("network", [AutoencoderKL, VQModel, IdentityAutoencoder])
def test_scales_from_python(network: Any) -> None:
    for scale in (math.nan, math.inf, 0, 0.0, None, "1"):
        with pytest.raises(ValueError, match=r"scaling_factor="):
            network(scaling_factor=scale)
    with pytest.raises(ValueError, match="sample_size='big' is not a size"):
        UNet2DConditionModel(sample_size="big")


def test_a_scheduler_may_have_infinite_bounds(tmp_path: Path) -> None:
    tiny_pipeline("bert").save_pretrained(tmp_path)
    change_json(tmp_path / "scheduler/scheduler_config.json", lambda_min_clipped=-math.inf)
    TextToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_beside_weights_is_not_applied_unasked(folder: Path, load: Any) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": "(.*)*(.*)*x"}
    (folder / "text_encoder/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"text_encoder holds an adapter \(adapter_config.json\).* load_lora_weights"):
        load(folder)


@pytest.mark.parametrize("what", ["unet/config.json", "vae", "text_encoder/model.safetensors", "model_index.json"])
def test_links_out_of_a_folder_are_refused(tmp_path: Path, what: str) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    tiny_pipeline("bert").save_pretrained(folder)
    shutil.move(folder / what, outside)
    (folder / what).symlink_to(os.path.relpath(outside, (folder / what).parent))
    with pytest.raises(ValueError, match=r"is a link that leads out of \S+/model, to \S+/outside; .* put the file"):
        TextToImagePipeline.from_pretrained(folder)


def test_links_within_a_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    tiny_pipeline("bert").save_pretrained(tmp_path / "real")
    weights = weights_of(tmp_path / "real", "unet")
    shutil.move(weights, tmp_path / "real/weights.safetensors")
    weights.symlink_to("../weights.safetensors")
    (tmp_path / "model").symlink_to("real")
    TextToImagePipeline.from_pretrained(tmp_path / "model")


def test_the_hubs_cache_has_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    folder = repository / "snapshots" / "0123"
    tiny_pipeline("bert").save_pretrained(folder)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        shutil.move(file, repository / "blobs" / f"{i:064}")
        file.symlink_to(os.path.relpath(repository / "blobs" / f"{i:064}", file.parent))
    TextToImagePipeline.from_pretrained(folder)


def test_a_network_alone_is_read_through_a_link_that_is_named(tmp_path: Path) -> None:
    from latentdiff.pipelines.storage.converting import network_alone

    pipeline = tiny_pipeline("bert")
    pipeline.vae.save_pretrained(tmp_path / "inner/real")
    (tmp_path / "vae").symlink_to("inner/real")
    assert torch.equal(network_alone(str(tmp_path / "vae")).encoder.conv_in.weight, pipeline.vae.encoder.conv_in.weight)
    shutil.move(tmp_path / "inner/real/config.json", tmp_path / "config.json")
    (tmp_path / "inner/real/config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        network_alone(str(tmp_path / "vae"))


@pytest.mark.parametrize("what", ["config.json", "diffusion_pytorch_model.safetensors", "vae"])
def test_a_network_alone_follows_no_link_out_of_its_folder(tmp_path: Path, what: str) -> None:
    tiny_pipeline("bert").vae.save_pretrained(tmp_path / "model/vae")
    place = tmp_path / "model" / (what if what == "vae" else f"vae/{what}")
    shutil.move(place, tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"vae\S* is a link that leads out of \S*, to \S*/outside"):
        AutoencoderKL.from_pretrained(tmp_path / "model", subfolder="vae")


@pytest.mark.parametrize("beginning", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_single_files_have_finite_weights(tmp_path: Path, beginning: str) -> None:
    pipeline = tiny_pipeline("clip")
    pipeline.save_single_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as stream:
        header = stream.metadata()
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.startswith(beginning) and name.endswith("weight"))
    state[name].view(-1)[0] = math.nan
    save_file(state, tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=r"model.safetensors: 1 weights of the \w+ have values that are not finite"):
        TextToImagePipeline.from_single_file(tmp_path / "model.safetensors", tokenizer=pipeline.tokenizer)
