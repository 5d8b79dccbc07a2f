"""Rectified flow from a folder of pictures to a picture: conditions, latents and pixels, fine-tuning, and diffusers."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from tiny import DENOISER, draw, tiny_pipeline
from trained import same, unet

from latentdiff import ClassConditionalPipeline, InpaintPipeline, TextToImagePipeline, UnconditionalPipeline
from latentdiff.diffusion import RectifiedFlow, process_of
from latentdiff.pipelines.core.scheduler_names import change_scheduler
from latentdiff.training.settings import DenoiserSettings, FinetuneSettings
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.finetune import finetune

FLOW = {"objective": "flow", "process_options": {"shift": 2.0}}


def train(values: dict[str, Any], output: Path, **changes: object) -> Path:
    return train_denoiser(DenoiserSettings.load(None, {**values, **FLOW, "output": str(output), **changes}))


def test_from_a_folder_to_a_picture_that_diffusers_draws_too(denoiser_settings: dict[str, Any], tmp_path: Path) -> None:
    out = train(denoiser_settings, tmp_path / "a", max_steps=3)
    train(denoiser_settings, tmp_path / "b", max_steps=1)
    assert same(unet(out), unet(train(denoiser_settings, tmp_path / "b", max_steps=3)))
    assert "min_snr_gamma: null" in (out / "training" / "settings.yaml").read_text()

    ours = TextToImagePipeline.from_pretrained(out)
    process = process_of(ours.scheduler)
    assert isinstance(process, RectifiedFlow)
    assert process.shift == 2.0
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(ours), torch.from_numpy(drawn(theirs)), atol=1e-4, rtol=0)

    ours.scheduler = change_scheduler(ours.scheduler, "euler")
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    call = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    latents = ours("a red thing", **call).images
    torch.testing.assert_close(latents, by_hand(theirs, plain), atol=1e-5, rtol=1e-4)


def drawn(pipeline: Any) -> Any:
    return draw(pipeline, height=16, width=16).numpy()


@torch.no_grad()
def by_hand(theirs: Any, scheduler: Any) -> torch.Tensor:
    """What a loop over diffusers' UNet and scheduler draws with `draw`'s noise, prompt, steps and guidance."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    prompt, empty = theirs.encode_prompt("a red thing", "cpu", 1, True)
    scheduler.set_timesteps(3)
    for timestep in scheduler.timesteps:
        states = torch.cat([empty, prompt])
        both = theirs.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=states).sample
        without, with_prompt = both.chunk(2)
        latents = scheduler.step(without + 3.0 * (with_prompt - without), timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("condition", ["none", "class"])
def test_of_pixels_without_text(labelled: Path, tmp_path: Path, condition: str) -> None:
    values = {**DENOISER, "data": str(labelled), "autoencoder": "pixels", "condition": condition, "max_steps": 2}
    out = train(values, tmp_path / "out", caption_column="colour", min_snr_gamma=5.0)
    kind = UnconditionalPipeline if condition == "none" else ClassConditionalPipeline
    pipeline: Any = kind.from_pretrained(out)
    assert isinstance(process_of(pipeline.scheduler), RectifiedFlow)
    given = [] if condition == "none" else ["red"]
    for name in ("dpm++", "euler", "heun", "unipc"):
        pipeline.scheduler = change_scheduler(pipeline.scheduler, name)
        assert pipeline(*given, seed=0, num_inference_steps=3, output_type="pt").images.isfinite().all()
    assert "min_snr_gamma: 5.0" in (out / "training" / "settings.yaml").read_text()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of noise levels."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tune(pictures: Path, model: Path, output: Path, **changes: object) -> Path:
    values = {"data": str(pictures), "batch_size": 2, "max_steps": 1, "checkpoint_every": 2, "sample_every": 3}
    values |= {"model": str(model), "output": str(output), "lora_rank": 2, **changes}
    return finetune(FinetuneSettings.load(None, values))


def test_a_model_of_noise_levels_is_taught_the_flow_and_goes_on_as_one(
    pictures: Path, model: Path, tmp_path: Path
) -> None:
    out = tune(pictures, model, tmp_path / "flow", **FLOW, method="full", lora_rank=0)
    assert not same(unet(out), unet(model))
    scheduler = TextToImagePipeline.from_pretrained(out).scheduler
    assert process_of(scheduler).scheduler_config() == RectifiedFlow(2.0).scheduler_config()
    again = tune(pictures, out, tmp_path / "again")
    scheduler = TextToImagePipeline.from_pretrained(again).scheduler
    assert process_of(scheduler).scheduler_config() == RectifiedFlow(2.0).scheduler_config()
    for folder in (out, again):
        assert "min_snr_gamma: null" in (folder / "training" / "settings.yaml").read_text()
    back = tune(pictures, again, tmp_path / "back", objective="gaussian")
    assert process_of(TextToImagePipeline.from_pretrained(back).scheduler).name == "gaussian"
    assert "min_snr_gamma: 5.0" in (back / "training" / "settings.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "curved"}, "there is no process 'curved'; there are gaussian, flow"),
        ({"process_options": {"shift": 2}}, "process_options are for a process that is named"),
        ({"objective": "flow", "process_options": {"shift": 0}}, "shift=0 must be above 0"),
        ({"objective": "flow", "process_options": {"power": 2}}, "process_options of process=flow: .*'power'"),
        (
            {
                **{"objective": "flow", "method": "textual-inversion", "lora_rank": 0},
                **{"placeholder_token": "<cup>", "initializer_token": "cup"},
            },
            "a new word does not teach process=flow",
        ),
    ],
)
def test_what_cannot_be_taught(
    pictures: Path, model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(pictures, model, tmp_path / "out", **changes)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "lcm"])
def test_what_is_kept_of_a_picture_stays(name: str) -> None:
    """Inpainting two pictures at once, from noise and from the picture: outside the mask latents are the picture's."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = change_scheduler(RectifiedFlow(2.0).scheduler(), name)
    inpaint = InpaintPipeline.from_pipe(pipeline)
    picture, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    call = {"image": picture, "mask_image": mask, "num_inference_steps": 4, "seed": 0, "output_type": "latent"}
    for strength in (0.6, 1.0):
        latents = inpaint(["a red thing"] * 2, strength=strength, **call).images
        assert latents.isfinite().all()
        kept = inpaint(["a cup"] * 2, strength=strength, **call).images
        torch.testing.assert_close(latents[..., 4:], kept[..., 4:])
        assert (latents[..., :4] - kept[..., :4]).abs().max() > 1e-4
