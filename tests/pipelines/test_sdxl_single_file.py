"""Stability's single files of SDXL: what is written is read again, here and by diffusers, and strictly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from kinds import VAE
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_sdxl import tiny_refiner, tiny_sdxl
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from latentdiff import ImageToImagePipeline, TextToImagePipeline
from latentdiff.pipelines.registry import kind_in, kind_taking
from latentdiff.pipelines.storage.converting import checkpoint_pipeline

EULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}
EULER |= {"steps_offset": 1}
REFINED: dict[str, Any] = {"strength": 0.5, "aesthetic_score": 9.0}
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


def test_the_refiners_file_is_the_same_model_here_and_in_diffusers(
    sdxl: Path, tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "refiner", tmp_path / "refiner.safetensors"
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    tiny_refiner(base).save_pretrained(folder)
    ImageToImagePipeline.from_pretrained(folder).save_single_file(file)
    parts = {".".join(name.split(".")[:4]) for name in load_file(file) if name.startswith("conditioner.")}
    assert {one.rsplit(".", 1)[0] for one in parts} == {"conditioner.embedders.0"}
    assert "conditioner.embedders.0.model" in parts
    found = quiet(ImageToImagePipeline.from_single_file(file))
    assert (type(found).__name__, found.text_encoder, found.tokenizer) == ("SDXLImageToImagePipeline", None, None)
    assert (found.config.requires_aesthetics_score, found.config.force_zeros_for_empty_prompt) == (True, False)
    call = {**CALL, "image": Image.linear_gradient("L").resize((16, 16)).convert("RGB"), **REFINED}
    assert largest_difference(found, quiet(ImageToImagePipeline.from_pretrained(folder)), **call) == 0
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline.from_single_file(
        str(file), config=str(folder), add_watermarker=False
    )
    assert largest_difference(found, quiet(theirs), **call) < 1e-4
    assert kind_in(file, ["image"]).name == "SDXLImageToImagePipeline"
    assert type(checkpoint_pipeline(str(file), False, False)) is type(found)  # as "latentdiff convert" reads it
    for source, why in (
        (file, "is SDXL's refiner, which has no first text encoder"),
        (folder, "has no text_encoder; it"),
    ):
        assert run("convert", source, tmp_path / "words", "--component", "text_encoder") == 2
        assert why in capsys.readouterr().err


def strangers_refiner(tokenizer: Any) -> Any:
    """Of four levels, as the released one, and wide enough for shapes alone to tell."""
    torch.manual_seed(1)
    count = len(tokenizer)
    words = CLIPTextConfig(
        vocab_size=count,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=48,
        hidden_act="gelu",
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=0,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=1,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=48 + 5 * 256,
    )
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=diffusers.AutoencoderKL(**{**VAE, "scaling_factor": 0.13025}),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(words).eval(),
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**EULER),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def test_a_strangers_refiner_is_read_by_its_shapes(sdxl: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "refiner", tmp_path / "sd_xl_refiner.safetensors"
    strangers_refiner(TextToImagePipeline.from_pretrained(sdxl).tokenizer_2).save_pretrained(folder)
    ours = quiet(ImageToImagePipeline.from_pretrained(folder))
    ours.save_single_file(tmp_path / "own.safetensors")
    save_file(load_file(tmp_path / "own.safetensors"), file)  # without the header that says all
    found = quiet(ImageToImagePipeline.from_single_file(file, sample_size=8, tokenizer_2=ours.tokenizer_2))
    for name in ("transformer_layers_per_block", "block_out_channels", "projection_class_embeddings_input_dim"):
        assert found.unet.config[name] == ours.unet.config[name]
    assert (found.config.requires_aesthetics_score, found.config.force_zeros_for_empty_prompt) == (True, False)
    call = {**CALL, "image": Image.linear_gradient("L").resize((16, 16)).convert("RGB"), **REFINED}
    assert largest_difference(found, ours, **call) == 0
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline.from_single_file(
        str(file), config=str(folder), add_watermarker=False
    )
    assert largest_difference(found, quiet(theirs), **call) < 1e-4
    told_more = load_file(file)
    told_more["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(128, 48 + 6 * 256)
    save_file(told_more, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="SDXL's refiner takes 1280, of four sizes and a score"):
        ImageToImagePipeline.from_single_file(tmp_path / "other.safetensors")


@pytest.mark.parametrize("lost", ["token_embedding.weight", "text_projection", "ln_final.bias"])
def test_partial_files_of_the_refiner_are_refused(lost: str, sdxl: Path, tmp_path: Path) -> None:
    file = tmp_path / "refiner.safetensors"
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    tiny_refiner(base).save_pretrained(tmp_path / "refiner")
    ImageToImagePipeline.from_pretrained(tmp_path / "refiner").save_single_file(file)
    with safe_open(file, "pt") as stream:
        header = stream.metadata()
    state = load_file(file)
    del state[f"conditioner.embedders.0.model.{lost}"]
    save_file(state, file, header)
    with pytest.raises(ValueError, match=f"(lacks|missing, such as) conditioner.embedders.0.model.{lost}"):
        ImageToImagePipeline.from_single_file(file)
