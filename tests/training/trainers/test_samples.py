"""What a training shows: samples beside originals and what was drawn before, at every stop; and dry runs."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import autoencoder_settings, tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.training.loop.checkpoints import step_reached
from latentdiff.training.loop.estimate import dry_run
from latentdiff.training.loop.figures import CELL, LINE, LINES, comparison_sheet
from latentdiff.training.settings import DenoiserSettings, FinetuneSettings
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.diffusion_models import TextModel
from latentdiff.training.trainers.finetune import finetune


def tuned(pictures: Path, tmp_path: Path, **changes: Any) -> FinetuneSettings:
    model = tmp_path / "model"
    if not model.exists():
        tiny_pipeline().save_pretrained(model)
    values = {"data": str(pictures), "model": str(model), "output": str(tmp_path / "out"), "batch_size": 2}
    values |= {"max_steps": 4, "lora_rank": 2, "sample_steps": 2, "sample_guidance_scale": 2.0}
    return FinetuneSettings.load(None, {**values, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_of_the_same_captions_stand_below_each_other() -> None:
    def image(colour: str) -> Image.Image:
        return Image.new("RGB", (140, 20), colour)

    sheet = np.array(
        comparison_sheet({"before": [image("red")] * 3, "now": [image("lime"), None, image("blue")]}, "abc", 2)
    )
    height = 40 + LINES * LINE + 4
    assert sheet.shape[:2] == (2 * height + 2, 3 * 142 - 2)  # a column of names and two of pictures, twice
    assert sheet[10, 142 + 70].tolist() == [255, 0, 0]
    assert sheet[30, 142 + 70].tolist() == [0, 255, 0]
    assert sheet[30, 2 * 142 + 70].tolist() == [238, 238, 238]  # there is none
    assert sheet[height + 2 + 30, 142 + 70].tolist() == [0, 0, 255]
    assert sheet[10, 100:136].min() < 128  # the name
    alone = comparison_sheet({"now": [Image.new("RGB", (20, 20))]}, ["a"])
    assert alone.size == (CELL, 80 + LINES * LINE + 4)  # each pixel is 4 x 4


def test_fine_tuning_shows_the_pictures_and_what_the_model_drew_before(pictures: Path, tmp_path: Path) -> None:
    settings = tuned(pictures, tmp_path, sample_every=2)
    out = finetune(settings)
    kept = sorted((out / "training" / "before").iterdir())
    assert len(kept) == 10  # one of each training picture's caption
    pipeline = TextToImagePipeline.from_pretrained(settings.model)
    call: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0, "seed": 0}
    (drawn,) = pipeline("a red thing", **call).images
    with Image.open(kept[0]) as before, Image.open(out / "training" / "samples" / "step-00000004.png") as sheet:
        difference = np.abs(np.array(before, np.int16) - np.array(drawn, np.int16))
        assert difference.max() <= 1
        assert sheet.height == 2 * (3 * 64 + LINES * LINE + 4) + 2  # picture, before, step 4
        row = np.array(sheet)[64:128:4, 130 + 32 : 130 + 96 : 4]
    assert np.array_equal(row, np.array(before))
    before_file = kept[0].stat().st_mtime_ns
    finetune(tuned(pictures, tmp_path, sample_every=2, max_steps=6))
    assert kept[0].stat().st_mtime_ns == before_file
    with Image.open(out / "training" / "samples" / "step-00000006.png") as sheet:
        assert np.array_equal(np.array(sheet)[64:128:4, 130 + 32 : 130 + 96 : 4], np.array(before))


def test_a_training_warns_once_of_a_size_far_from_the_models(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finetune(tuned(pictures, tmp_path, resolution=48, sample_every=2, sample_prompts=["a cat"]))
    assert sum("trained on 16 x 16: far from that size" in message for message in caplog.messages) == 1


def test_a_stopped_training_draws_after_all_is_saved(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rarely = {"max_steps": 10**6, "sample_every": 10**6, "checkpoint_every": 10**6, "max_minutes": 1e-3}
    draw = TextModel.draw

    def interrupted(model: TextModel, *arguments: Any, **more: Any) -> Any:
        if (tmp_path / "out" / "model_index.json").exists():  # it is at the stop
            os.kill(os.getpid(), signal.SIGINT)
        return draw(model, *arguments, **more)

    out = finetune(tuned(pictures, tmp_path, **rarely))
    step = step_reached(out)
    assert step > 0
    assert [file.name for file in (out / "training" / "samples").iterdir()] == [f"step-{step:08d}.png"]
    assert (out / "samples.png").exists()

    monkeypatch.setattr(TextModel, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):  # as any Ctrl-C ends
        finetune(tuned(pictures, tmp_path, **rarely))
    later = step_reached(out)
    assert later > step
    assert not (out / "training" / "samples" / f"step-{later:08d}.png").exists()
    card = (out / "README.md").read_text()
    assert f"in {later:,} optimizer steps" in card
    assert f"These samples are of step {step:,}." in card
    assert f"samples.png is of step {step}: samples of step {later} were left out" in caplog.text
    monkeypatch.setattr(TextModel, "draw", draw)
    last = {**rarely, "max_steps": later}
    finetune(tuned(pictures, tmp_path, **last))  # nothing is trained, and what was left out is drawn
    assert (out / "training" / "samples" / f"step-{later:08d}.png").exists()
    assert "These samples are of" not in (out / "README.md").read_text()


def test_what_was_drawn_before_a_training_is_not_drawn_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = TextModel.draw

    def one_at_a_time(model: TextModel, prompts: Any, *arguments: Any, seed: int = 0, **more: Any) -> Any:
        if seed == 1 and not drawn[1:]:
            os.kill(os.getpid(), signal.SIGINT)
        drawn.append(seed)
        return draw(model, prompts, *arguments, seed=seed, **more)

    monkeypatch.setattr(TextModel, "draw", one_at_a_time)
    with pytest.raises(KeyboardInterrupt):
        finetune(tuned(pictures, tmp_path))
    first = tmp_path / "out" / "training" / "before" / "00.png"
    assert [path.name for path in first.parent.iterdir()] == ["00.png"]
    written = first.stat().st_mtime_ns
    drawn.append(-1)
    finetune(tuned(pictures, tmp_path, max_steps=1))
    assert drawn[:3] == [0, -1, 1]
    assert first.stat().st_mtime_ns == written
    assert len(list(first.parent.iterdir())) == 10


def test_an_autoencoder_that_is_stopped_shows_reconstructions(pictures: Path, tmp_path: Path) -> None:
    rarely = {"max_steps": 10**6, "sample_every": 10**6, "checkpoint_every": 10**6, "max_minutes": 1e-3}
    out = train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", **rarely))
    assert (out / "training" / "samples" / f"step-{step_reached(out):08d}.png").exists()
    assert '"psnr"' in (out / "evaluation.json").read_text()


def test_dry_runs_write_nothing(
    denoiser_settings: dict[str, object], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    of_denoiser = DenoiserSettings.load(None, {**denoiser_settings, "output": str(output), "max_steps": 2})
    of_subject = {"method": "dreambooth", "caption": "a red cup", "class_prompt": "a cup", "class_pictures": 30}
    settings = tuned(pictures, tmp_path, **of_subject)
    before = files(tmp_path)
    with caplog.at_level(logging.INFO, "latentdiff"):
        dry_run(train_autoencoder, autoencoder_settings(pictures, output, max_steps=2))
        dry_run(train_denoiser, of_denoiser)
        dry_run(finetune, settings)
    assert files(tmp_path) == before
    assert caplog.text.count("Time: about") == caplog.text.count("Memory: ") == caplog.text.count("Disk: about") == 3
    assert "drawing 30 class pictures, before all else, takes about" in caplog.text
    assert "encoding all pictures, once and before the first step, takes about" in caplog.text
    assert "with samples and figures 2 times" in caplog.text  # before and after fine-tuning


def test_samples_besides_the_plan_take_no_more_than_their_time(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("latentdiff.training.trainers.samples.SOON", 0.0)
    monkeypatch.setattr("latentdiff.training.loop.stopping.FIRST_LOOK", 0.0)
    out = finetune(tuned(pictures, tmp_path, max_steps=2))
    assert [file.name for file in (out / "training" / "before").iterdir()] == ["00.png"]
    assert len(list((out / "training" / "samples").iterdir())) == 2
    for step, drawn in ((1, 1), (2, 10)):
        with Image.open(out / "training" / "samples" / f"step-{step:08d}.png") as sheet:
            pixels = np.array(sheet)
        assert pixels.shape[1] == 130 * (1 + min(drawn, 8)) - 2  # a column of names, and those that have a sample
        row = 2 * 64 + 32  # the middle of the third row: picture, before, this step
        cells = [pixels[row + i // 8 * 237, 130 * (i % 8 + 1) + 5].tolist() for i in range(drawn)]
        assert [238, 238, 238] not in cells
    assert caplog.text.count("1 of 10 samples were drawn, for which there was time") == 2
