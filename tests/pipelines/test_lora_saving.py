"""Pipelines with LoRAs loaded are not saved as if they had none: nothing is written, and good folders stay good."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loras import diffusers_lora
from tiny import draw, tiny_pipeline

from latentdiff import TextToImagePipeline


def loaded(tmp_path: Path, state: str) -> Any:
    pipeline = tiny_pipeline("clip")
    file = diffusers_lora(tiny_pipeline("clip"), tmp_path / "lora", text=state != "unet")
    if state == "text_encoder":
        from safetensors.torch import load_file

        pipeline.load_lora_weights({key: value for key, value in load_file(file).items() if key.startswith("text_")})
    else:
        pipeline.load_lora_weights(file)
    if state == "disabled":
        pipeline.disable_lora()
    if state == "fused":
        pipeline.fuse_lora()
    return pipeline


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("state", ["both", "unet", "text_encoder", "disabled", "fused"])
def test_a_folder_is_refused_with_nothing_written(tmp_path: Path, state: str) -> None:
    tiny_pipeline("clip").save_pretrained(tmp_path / "good")
    pipeline = loaded(tmp_path, state)
    before = contents(tmp_path)
    for name in ("good", "new"):
        with pytest.raises(ValueError, match=r"has LoRAs loaded.* unload_lora_weights\(\).* fuse_lora\(\)"):
            pipeline.save_pretrained(tmp_path / name)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("way", ["single file", "unet", "text_encoder"])
def test_so_are_other_ways_of_saving(tmp_path: Path, way: str) -> None:
    from latentdiff.pipelines.storage.converting import write_part

    pipeline = loaded(tmp_path / "lora", "both")
    save = {
        "single file": lambda: pipeline.save_single_file(tmp_path / "model.safetensors"),
        "unet": lambda: pipeline.unet.save_pretrained(tmp_path / "unet"),
        "text_encoder": lambda: write_part(pipeline, way, tmp_path / way, None, overwrite=False),
    }
    with pytest.raises(ValueError, match=r"has LoRAs loaded"):
        save[way]()
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_saved_after_unloading(tmp_path: Path, fused: bool) -> None:
    pipeline = loaded(tmp_path, "fused" if fused else "both")
    changed = draw(pipeline)
    pipeline.unload_lora_weights()
    expected = draw(pipeline)
    assert ((expected - changed).abs().max() < 1e-4) == fused
    pipeline.save_pretrained(tmp_path / "model")
    assert (draw(TextToImagePipeline.from_pretrained(tmp_path / "model")) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("state", ["both", "unet", "text_encoder", "disabled"])
def test_it_is_saved_when_the_only_one_is_deleted(tmp_path: Path, state: str) -> None:
    pipeline = loaded(tmp_path, state)
    pipeline.delete_adapters("default_0")
    torch.testing.assert_close(draw(pipeline), draw(tiny_pipeline("clip")), atol=0, rtol=0)
    pipeline.save_pretrained(tmp_path / "model")
    again = TextToImagePipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(draw(again), draw(pipeline), atol=0, rtol=0)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert pipeline.get_list_adapters()


def test_a_lora_stays_when_another_is_deleted(tmp_path: Path) -> None:
    pipeline = loaded(tmp_path, "both")
    alone = draw(pipeline)
    pipeline.load_lora_weights(diffusers_lora(tiny_pipeline("clip"), tmp_path / "other", text=False, seed=1), "other")
    pipeline.delete_adapters("other")
    pipeline.set_adapters("default_0")
    torch.testing.assert_close(draw(pipeline), alone)
    with pytest.raises(ValueError, match="has LoRAs loaded"):
        pipeline.save_pretrained(tmp_path / "model")
