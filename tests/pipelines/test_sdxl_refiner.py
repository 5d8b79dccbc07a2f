"""SDXL's refiner goes on with the base model's latents, or redraws pictures, as in diffusers."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from PIL import Image
from tiny_sdxl import tiny_refiner, tiny_sdxl

from latentdiff import ImageToImagePipeline, InpaintPipeline, TextToImagePipeline

Folders = tuple[Path, Path]
CALL: dict[str, Any] = {"prompt": "a car", "num_inference_steps": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Of a base model and its refiner, of diffusers."""
    base, refiner = (tmp_path_factory.mktemp("sdxl") / name for name in ("base", "refiner"))
    pipeline = tiny_sdxl()
    pipeline.save_pretrained(base)
    tiny_refiner(pipeline).save_pretrained(refiner)
    return base, refiner


def quiet(pipeline: Any, scheduler: Any = None) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline


def pictures() -> dict[str, Image.Image]:
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 12, 15))
    return {"image": Image.linear_gradient("L").resize((16, 16)).convert("RGB"), "mask_image": mask}


@pytest.mark.parametrize(
    "scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_the_latents_are_handed_over_as_in_diffusers(folders: Folders, scheduler: str) -> None:
    base, refiner = folders
    kind = getattr(diffusers, scheduler)
    ours = quiet(TextToImagePipeline.from_pretrained(base), kind)
    theirs = quiet(diffusers.StableDiffusionXLPipeline.from_pretrained(base), kind)
    first = ours(**CALL, seed=3, denoising_end=0.6, output_type="latent").images
    whole = ours(**CALL, seed=3, output_type="latent").images
    assert (first - whole).abs().max() > 0.1
    wanted = theirs(**CALL, generator=torch.Generator().manual_seed(3), denoising_end=0.6, output_type="latent").images
    torch.testing.assert_close(first, wanted, atol=1e-4, rtol=1e-4)
    ours = quiet(ImageToImagePipeline.from_pretrained(refiner), kind)
    theirs = quiet(diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner), kind)
    rest: dict[str, Any] = {**CALL, "image": first, "denoising_start": 0.6}
    for call in ({}, {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}, {"denoising_end": 0.9}):
        assert largest_difference(ours, theirs, **rest, **call) < 1e-4, call


def test_the_base_goes_on_with_its_own_latents(folders: Folders) -> None:
    base = quiet(TextToImagePipeline.from_pretrained(folders[0]))
    first = base(**CALL, seed=3, denoising_end=0.6, output_type="latent").images
    parts = quiet(ImageToImagePipeline.from_pipe(base))(**CALL, image=first, denoising_start=0.6, output_type="pt")
    torch.testing.assert_close(parts.images, base(**CALL, seed=3, output_type="pt").images, atol=1e-5, rtol=1e-5)


def test_pictures_are_redrawn_and_painted_in_as_in_diffusers(folders: Folders) -> None:
    refiner, given = folders[1], pictures()
    ours = quiet(ImageToImagePipeline.from_pretrained(refiner))
    theirs = quiet(diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner))
    call: dict[str, Any] = {**CALL, "image": given["image"], "strength": 0.5}
    sizes = {"original_size": (40, 32), "crops_coords_top_left": (3, 5), "negative_original_size": (8, 9)}
    for more in ({}, {"aesthetic_score": 3.0}, {"negative_prompt": "sun", **sizes}, {"denoising_end": 0.9}):
        assert largest_difference(ours, theirs, **call, **more) < 1e-4, more
    high, low = (ours(**call, seed=1, aesthetic_score=one, output_type="pt").images for one in (10.0, 1.0))
    assert (high - low).abs().max() > 1e-4
    for folder in folders:
        ours = quiet(InpaintPipeline.from_pretrained(folder))
        theirs = quiet(diffusers.StableDiffusionXLInpaintPipeline.from_pretrained(folder))
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        call = {**CALL, **given, "height": 16, "width": 16}
        for more in ({"strength": 0.7}, {"denoising_start": 0.4, "image": latents}, {"denoising_end": 0.7}):
            assert largest_difference(ours, theirs, **{"strength": 1.0, **call, **more}) < 1e-4, (folder, more)


def test_a_saved_refiner_is_diffusers(folders: Folders, tmp_path: Path) -> None:
    ours = quiet(ImageToImagePipeline.from_pretrained(folders[1]))
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert (index["requires_aesthetics_score"], index["force_zeros_for_empty_prompt"]) == (True, False)
    theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved"))
    assert type(theirs) is diffusers.StableDiffusionXLImg2ImgPipeline
    assert largest_difference(ours, theirs, **CALL, image=pictures()["image"], strength=0.5) < 1e-4
    ours.save_single_file(tmp_path / "file.safetensors")
    packed = quiet(ImageToImagePipeline.from_single_file(tmp_path / "file.safetensors"))
    assert packed.config.requires_aesthetics_score is True
    assert largest_difference(packed, ours, **CALL, image=pictures()["image"], strength=0.5) == 0


def test_a_refiner_learns_a_word_by_the_vectors_of_the_second_encoder(folders: Folders) -> None:
    torch.manual_seed(0)
    word, call = {"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 24)}, {**CALL, "prompt": "a <x>"}
    ours, theirs = (
        quiet(kind.from_pretrained(folders[1]))
        for kind in (ImageToImagePipeline, diffusers.StableDiffusionXLImg2ImgPipeline)
    )
    call |= {"image": pictures()["image"], "strength": 0.9}
    plain = ours(**call, seed=1, output_type="pt").images
    ours.load_textual_inversion(word, "<x>")
    theirs.load_textual_inversion(
        word["clip_g"], token="<x>", text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2
    )
    assert largest_difference(ours, theirs, **call) < 1e-4
    taught = ours(**call, seed=1, output_type="pt").images
    assert (taught - plain).abs().max() > 1e-3
    ours.unload_textual_inversion("<x>")
    assert torch.equal(ours(**call, seed=1, output_type="pt").images, plain)
    base = quiet(TextToImagePipeline.from_pretrained(folders[0]))
    base.load_textual_inversion(word, "<x>")
    assert ours.unknown_words(base) == ["<x>"]
    ours.learn_words(base)
    assert ours.unknown_words(base) == []
    assert torch.equal(ours(**call, seed=1, output_type="pt").images, taught)
    ours.load_textual_inversion({"clip_g": torch.randn(1, 24)}, "<y>")
    with pytest.raises(ValueError, match="holds clip_l; the one text encoder of SDXL's refiner needs clip_g"):
        ours.load_textual_inversion({"clip_l": torch.randn(1, 16)}, "<z>")
    with pytest.raises(ValueError, match="holds clip_g; SDXL's two text encoders need clip_l and clip_g"):
        base.learn_words(ours)


@pytest.mark.parametrize(
    ("place", "call", "why"),
    [
        (0, {"denoising_start": 0.4, "denoising_end": 0.4}, "cannot be larger than or equal to `denoising_end`: 0.4"),
        (0, {"denoising_start": 1.0}, "none of the 5 steps is left by denoising_start=1.0; give more"),
        (0, {"denoising_end": 0.0}, "denoising_end must lie above 0 and up to 1, not 0.0"),
        (0, {"aesthetic_score": 6.0}, "takes no aesthetic_score, which is for SDXL's refiner"),
        (1, {"aesthetic_score": float("nan")}, "aesthetic_score must be a finite number"),
        (1, {"prompt_2": "sun"}, "this model has one text encoder, which reads the prompt; leave prompt_2 out"),
    ],
)
def test_bad_calls(folders: Folders, place: int, call: dict[str, Any], why: str) -> None:
    pipeline = quiet(ImageToImagePipeline.from_pretrained(folders[place]))
    with pytest.raises(ValueError, match=why):
        pipeline(**{**CALL, "image": pictures()["image"], **call})


def test_a_refiner_taken_for_another_model(folders: Folders) -> None:
    base, refiner = folders
    with pytest.raises(ValueError, match="takes 5 numbers besides a pooled embedding of 20, and 6 are given: it is a"):
        quiet(TextToImagePipeline.from_pretrained(refiner))(**CALL)
    told = quiet(ImageToImagePipeline.from_pretrained(base, requires_aesthetics_score=True))
    with pytest.raises(ValueError, match=r"takes 6 numbers .* and 5 are given: it takes no aesthetic score"):
        told(**CALL, image=pictures()["image"])
    with pytest.raises(ValueError, match="denoising_start needs the latents to go on with"):
        quiet(TextToImagePipeline.from_pretrained(base))(**CALL, denoising_start=0.5)
