"""Stability's single files of SDXL: what is written is read again, here and by diffusers, and strictly."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_sdxl import tiny_sdxl

from latentdiff import ImageToImagePipeline, TextToImagePipeline
from latentdiff.pipelines.registry import kind_in, kind_taking

CALL: dict[str, Any] = {"prompt": "a red car", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(sdxl: Path) -> Path:
    place = sdxl.parent / "model.safetensors"
    TextToImagePipeline.from_pretrained(sdxl).save_single_file(place)
    return place


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_file_is_the_same_model_here_and_in_diffusers(sdxl: Path, file: Path) -> None:
    names = {".".join(name.split(".")[:3]) for name in load_file(file) if name.startswith("conditioner.")}
    assert names == {"conditioner.embedders.0", "conditioner.embedders.1"}
    found = quiet(TextToImagePipeline.from_single_file(file))
    assert type(found).__name__ == "SDXLTextToImagePipeline"
    assert largest_difference(found, quiet(TextToImagePipeline.from_pretrained(sdxl)), **CALL) == 0
    theirs = diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(sdxl), add_watermarker=False)
    assert largest_difference(found, quiet(theirs), **CALL) < 1e-4
    assert type(ImageToImagePipeline.from_single_file(file)).__name__ == "SDXLImageToImagePipeline"
    assert kind_in(file).name == "SDXLTextToImagePipeline"
    with pytest.raises(ValueError, match="is of Stable Diffusion XL, so a SuperResolutionPipeline cannot draw with it"):
        kind_taking(("image",), "StableDiffusionUpscalePipeline").load().from_single_file(file)


@pytest.mark.parametrize(
    ("lost", "why"),
    [
        ("conditioner.embedders.0.transformer.text_model.embeddings.token", "is a Stable Diffusion XL model and lacks"),
        ("conditioner.embedders.1.model.text_projection", "is a Stable Diffusion XL model and lacks"),
        ("conditioner.embedders.1.model.ln_final.bias", "1 weights of the second text encoder are missing"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "weights of the first text encoder"),
        ("model.diffusion_model.label_emb.0.2.bias", "1 weights of the UNet are missing"),
    ],
)
def test_partial_files_are_refused(file: Path, tmp_path: Path, lost: str, why: str) -> None:
    with safe_open(file, "pt") as stream:
        header = stream.metadata()
    state = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(lost)}
    assert len(state) < len(load_file(file))
    save_file(state, tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=why):
        TextToImagePipeline.from_single_file(tmp_path / "model.safetensors")


def test_the_refiner_and_other_models_are_refused(file: Path, tmp_path: Path, pipeline: Any) -> None:
    state = load_file(file) | {"conditioner.embedders.0.model.ln_final.bias": torch.ones(2)}
    save_file(state, tmp_path / "refiner.safetensors")
    with pytest.raises(ValueError, match="is Stable Diffusion XL's refiner"):
        TextToImagePipeline.from_single_file(tmp_path / "refiner.safetensors")
