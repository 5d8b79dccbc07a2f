"""SDXL's models of few steps, Turbo, Lightning, LCM and Hyper-SD, draw as in diffusers, each with its own scheduler."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
from compare import largest_difference
from PIL import Image
from tiny_sdxl import UNET, tiny_sdxl

from latentdiff import ImageToImagePipeline, TextToImagePipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TRAILING = {**BETAS, "timestep_spacing": "trailing"}
MODELS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "turbo": (
        "EulerAncestralDiscreteScheduler",
        TRAILING,
        [{"num_inference_steps": steps, "guidance_scale": 0.0} for steps in (1, 4)],
    ),
    "lightning": ("EulerDiscreteScheduler", TRAILING, [{"num_inference_steps": 4, "guidance_scale": 0}]),
    "lightning-1": (
        "EulerDiscreteScheduler",
        {**TRAILING, "prediction_type": "sample"},
        [{"num_inference_steps": 1, "guidance_scale": 0.0}],
    ),
    "lcm": (
        "LCMScheduler",
        {**BETAS, "original_inference_steps": 50},
        [{"num_inference_steps": 4, "guidance_scale": scale} for scale in (0.0, 8.0)],
    ),
    "hyper": ("DDIMScheduler", {**TRAILING, "set_alpha_to_one": False}, [{"num_inference_steps": 2}]),
    "hyper-tcd": ("TCDScheduler", BETAS, [{"num_inference_steps": 3, "guidance_scale": 0.0, "eta": 0.5}]),
}


def saved(folder: Path, name: str, embeds_guidance: bool = False) -> tuple[Path, list[dict[str, Any]]]:
    scheduler, config, calls = MODELS[name]
    pipeline = tiny_sdxl()
    if embeds_guidance:
        pipeline.unet = diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=16)
    pipeline.scheduler = getattr(diffusers, scheduler)(**config)
    pipeline.save_pretrained(folder)
    return folder, calls


@pytest.mark.parametrize(("name", "embeds_guidance"), [*((name, False) for name in MODELS), ("lcm", True)])
def test_they_draw_diffusers_pictures(name: str, embeds_guidance: bool, tmp_path: Path) -> None:
    folder, calls = saved(tmp_path / "model", name, embeds_guidance)
    both = (TextToImagePipeline, diffusers.StableDiffusionXLPipeline)
    ours, theirs = (kind.from_pretrained(folder) for kind in both)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    for call in calls:
        assert largest_difference(ours, theirs, prompt=["a car", "sun"], **call) < 1e-4, call


def test_an_autoencoder_may_say_how_its_channels_spread(tmp_path: Path) -> None:
    pipeline = tiny_sdxl()
    spread = {"latents_mean": [0.5, -1.0, 0.0, 1.0], "latents_std": [2.0, 0.5, 1.0, 3.0]}
    pipeline.vae.register_to_config(**spread)  # as Playground 2.5's
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    pipeline.save_pretrained(tmp_path / "model")
    both = (ImageToImagePipeline, diffusers.StableDiffusionXLImg2ImgPipeline)
    ours, theirs = (kind.from_pretrained(tmp_path / "model") for kind in both)
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    assert largest_difference(ours, theirs, prompt="a car", image=image, strength=0.7, num_inference_steps=3) < 1e-4


def test_turbo_redraws_diffusers_pictures(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "model", "turbo")
    both = (ImageToImagePipeline, diffusers.StableDiffusionXLImg2ImgPipeline)
    ours, theirs = (kind.from_pretrained(folder) for kind in both)
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    call = {"num_inference_steps": 2, "strength": 0.5, "guidance_scale": 0.0}
    assert largest_difference(ours, theirs, prompt="a car", image=image, **call) < 1e-4
