"""SDXL's folders are drawn from as diffusers' pipelines draw, whatever class of ours is asked."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from PIL import Image
from tiny import VAE
from tiny_sdxl import tiny_sdxl

from latentdiff import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline
from latentdiff.pipelines.registry import kind_in, kind_taking


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers' StableDiffusionXLPipeline."""
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl().save_pretrained(folder)
    return folder


def both(ours: Any, theirs: Any, folder: Path) -> tuple[Any, Any]:
    pipelines = ours.from_pretrained(folder), theirs.from_pretrained(folder, add_watermarker=False)
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((16, 16)).convert("RGB")


CALLS: list[dict[str, Any]] = [
    {"prompt": ["a red car", "sun"], "num_images_per_prompt": 2},
    {"prompt": "a car", "negative_prompt": ""},
    {"prompt": "a car", "negative_prompt": "blue", "clip_skip": 1},
    {"prompt": "a car", "guidance_scale": 1.0, "height": 24},
    {"prompt": "a car", "original_size": (40, 32), "crops_coords_top_left": (3, 5), "target_size": (16, 24)},
    {"prompt": ["a car", "sun"], "prompt_2": ["red", "in the sun"], "negative_prompt": "sun", "negative_prompt_2": "x"},
    {"prompt": "a car", "negative_original_size": (8, 9), "negative_target_size": (32, 8), "original_size": (64, 8)},
]


def test_text_to_image_draws_diffusers_pictures(sdxl: Path) -> None:
    ours, theirs = both(TextToImagePipeline, diffusers.StableDiffusionXLPipeline, sdxl)
    assert type(ours).__name__ == "SDXLTextToImagePipeline"
    plain = ours("a car", seed=0, output_type="pt", num_inference_steps=2).images
    for call in CALLS:
        assert largest_difference(ours, theirs, **{"num_inference_steps": 3, **call}) < 1e-4, call
    told = ours("a car", seed=0, output_type="pt", num_inference_steps=2, original_size=(512, 512)).images
    assert (told - plain).abs().max() > 1e-3  # the sizes matter
    found, wanted = ours.encode_prompt("a car"), theirs.encode_prompt("a car")
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = ours(**dict(zip(names, found, strict=True)), seed=0, output_type="pt", num_inference_steps=2).images
    torch.testing.assert_close(given, plain, atol=1e-5, rtol=1e-5)


def test_image_to_image_and_inpainting_draw_diffusers_pictures(sdxl: Path) -> None:
    ours, theirs = both(ImageToImagePipeline, diffusers.StableDiffusionXLImg2ImgPipeline, sdxl)
    call = {"prompt": "a red car", "image": picture(), "strength": 0.6, "num_inference_steps": 4}
    assert largest_difference(ours, theirs, **call) < 1e-4
    ours, theirs = both(InpaintPipeline, diffusers.StableDiffusionXLInpaintPipeline, sdxl)
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 12, 15))
    assert largest_difference(ours, theirs, **call, mask_image=mask, height=16, width=16) < 1e-4


def test_what_is_saved_is_diffusers_and_ours(sdxl: Path, tmp_path: Path) -> None:
    ours = TextToImagePipeline.from_pretrained(sdxl)
    ours.save_pretrained(tmp_path / "folder")
    ours.save_single_file(tmp_path / "file.safetensors")
    ours, theirs = both(TextToImagePipeline, diffusers.DiffusionPipeline, tmp_path / "folder")
    assert type(theirs) is diffusers.StableDiffusionXLPipeline
    call: dict[str, Any] = {"prompt": "a car", "num_inference_steps": 2}
    assert largest_difference(ours, theirs, **call) < 1e-4
    packed = TextToImagePipeline.from_single_file(tmp_path / "file.safetensors")
    packed.set_progress_bar_config(disable=True)
    assert largest_difference(packed, ours, **call) == 0
    shared = ImageToImagePipeline.from_pipe(theirs)
    assert type(shared).__name__ == "SDXLImageToImagePipeline"
    assert type(InpaintPipeline.from_pipe(shared)).__name__ == "SDXLInpaintPipeline"


def test_the_kind_is_found_by_the_folder(sdxl: Path, folder: Path) -> None:
    assert kind_in(sdxl).name == "SDXLTextToImagePipeline"
    assert kind_in(sdxl, ("image",)).name == "SDXLImageToImagePipeline"
    assert kind_in(folder, ("image",)).name == "ImageToImagePipeline"
    assert kind_taking(("image",), "StableDiffusionXLInpaintPipeline").name == "SDXLImageToImagePipeline"
    with pytest.raises(ValueError, match="is of a StableDiffusionPipeline, which SDXLTextToImagePipeline cannot draw"):
        kind_in(sdxl).load().from_pretrained(folder)


def test_half_precision_keeps_the_autoencoder_finite(sdxl: Path) -> None:
    ours = TextToImagePipeline.from_pretrained(sdxl, dtype=torch.float16)
    assert (ours.vae.dtype, ours.unet.dtype) == (torch.float32, torch.float16)
    safe = diffusers.AutoencoderKL(**VAE, force_upcast=False).half()
    assert TextToImagePipeline.from_pretrained(sdxl, dtype=torch.float16, vae=safe).vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"original_size": (0, 8)}, r"original_size must be two whole numbers from 1 to 65536, not \(0, 8\)"),
        ({"target_size": (8,)}, "target_size must be two whole numbers"),
        ({"crops_coords_top_left": (-1, 0)}, "crops_coords_top_left must be two whole numbers from 0"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 12, 40)}, "without pooled_prompt_embeds"),
        ({"pooled_prompt_embeds": torch.zeros(1, 20)}, "pooled_prompt_embeds needs prompt_embeds"),
        ({"negative_prompt_2": "sun"}, "negative_prompt_2 needs a negative_prompt, which the first text encoder reads"),
        ({"prompt_2": ["a", "b"]}, r"2 prompts \(prompt_2\) were given for 1 prompts; give one for each"),
        ({"clip_skip": 7}, r"clip_skip must lie in \[0, 1\]"),
    ],
)
def test_bad_calls(sdxl: Path, call: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TextToImagePipeline.from_pretrained(sdxl)(**{"prompt": "a car", **call})


def test_bad_parts(sdxl: Path, pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with pytest.raises(ValueError, match="needs a UNet with addition_embed_type='text_time', and this one has None"):
        TextToImagePipeline.from_pretrained(sdxl, unet=pipeline.unet)
    for name, value in (("original_size", (8, 8)), ("prompt_2", "sun")):
        with pytest.raises(ValueError, match=f"{name} is for SDXL, and this is a TextToImagePipeline"):
            pipeline("a car", **{name: value}, num_inference_steps=1)
    with pytest.raises(ValueError, match="is drawn with by torch only; leave runtime"):
        TextToImagePipeline.from_pretrained(sdxl, runtime="onnx")


NOTHING = [None, None]
SAID = {"text_encoder_2": ["transformers", "CLIPTextModel"]}


@pytest.mark.parametrize(
    ("file", "changes", "why"),
    [
        ("model_index.json", {"text_encoder_2": NOTHING}, "model_index.json: names no text_encoder_2, which a Stable"),
        ("model_index.json", SAID, "text_encoder_2 must be a CLIPTextModelWithProjection, whose pooled embedding"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "no"}, "must be true or false, not 'no'"),
        ("unet/config.json", {"addition_embed_type": None}, "with addition_embed_type='text_time', and this one has"),
        ("unet/config.json", {"addition_time_embed_dim": None}, "'text_time' needs addition_time_embed_dim"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 60}, "the weights do not fit config.json"),
    ],
)
def test_hostile_folders(sdxl: Path, tmp_path: Path, file: str, changes: dict[str, Any], why: str) -> None:
    shutil.copytree(sdxl, tmp_path / "model")
    place = tmp_path / "model" / file
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))
    with pytest.raises(ValueError, match=why):
        TextToImagePipeline.from_pretrained(tmp_path / "model")


def test_one_text_encoder_given_as_two(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    said = {**json.loads(index.read_text()), "_class_name": "StableDiffusionXLPipeline"}
    index.write_text(json.dumps(said))
    with pytest.raises(
        ValueError, match="names no text_encoder_2 and no tokenizer_2, which a StableDiffusionXLPipeline"
    ):
        TextToImagePipeline.from_pretrained(tmp_path / "model")
