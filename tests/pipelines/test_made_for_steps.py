"""What a folder says of a distilled model: the steps and the guidance that it draws with, and a warning of others."""

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
from tiny import draw, tiny_pipeline

from latentdiff import TextToImagePipeline


def loaded(folder: Path, steps: int, guidance: float, scheduler: Any = None, **unet: Any) -> TextToImagePipeline:
    """A model with these defaults, from its folder."""
    pipeline = tiny_pipeline("clip", **unet)
    pipeline.scheduler = scheduler or pipeline.scheduler
    pipeline.register_defaults(num_inference_steps=steps, guidance_scale=guidance)
    pipeline.save_pretrained(folder)
    pipeline = TextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def warnings(pipeline: TextToImagePipeline, caplog: pytest.LogCaptureFixture, *steps: int | None) -> int:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "latentdiff"):
        for count in steps:
            draw(pipeline, num_inference_steps=count)
    return caplog.text.count(f"with a model that was made for {pipeline.defaults['num_inference_steps']}")


def test_other_steps_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = loaded(tmp_path, 2, 1.0)
    assert pipeline.made_for_steps == 2
    assert warnings(pipeline, caplog, 2, None) == 0
    assert warnings(pipeline, caplog, 4, 1, 4) == 1
    assert "Drawing in 4 steps" in caplog.text


def test_an_lcm_takes_any_few_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = loaded(tmp_path, 4, 3.0, diffusers.LCMScheduler(), time_cond_proj_dim=8)
    assert pipeline.made_for_steps == 4
    assert warnings(pipeline, caplog, 1, 2, 8) == 0
    assert warnings(pipeline, caplog, 12) == 1


@pytest.mark.parametrize(("steps", "guidance"), [(4, 3.0), (25, 1.0)])
def test_models_that_were_not_distilled_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, guidance: float
) -> None:
    pipeline = loaded(tmp_path, steps, guidance)
    assert pipeline.made_for_steps is None
    assert warnings(pipeline, caplog, 1, 3) == 0


def test_guidance_of_a_model_made_for_none_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = loaded(tmp_path, 2, 1.0)
    for scale in (None, 1.0):
        draw(pipeline, num_inference_steps=2, guidance_scale=scale)
    assert "guidance" not in caplog.text
    for scale in (7.0, [1.0, 3.0]):
        pipeline(["a cup"] * 2, num_inference_steps=2, guidance_scale=scale, output_type="pt")
    assert caplog.text.count("Drawing with guidance 7 with a model that was made for none") == 1
    assert caplog.text.count("made for none") == 1


@pytest.mark.parametrize(("steps", "guidance"), [(25, 1.0), (4, 3.0)])
def test_guidance_of_others_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, guidance: float
) -> None:
    draw(loaded(tmp_path, steps, guidance), num_inference_steps=1, guidance_scale=7.0)
    assert "made for none" not in caplog.text
