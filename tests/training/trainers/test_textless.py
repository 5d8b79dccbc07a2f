"""Denoisers that are told a class or nothing: trained, saved and drawn with."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import DENOISER

from latentdiff import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.training.settings import ClassifierSettings, DenoiserSettings
from latentdiff.training.trainers.classifier import train_classifier
from latentdiff.training.trainers.denoiser import train_denoiser

SMALL = {**DENOISER, "block_out_channels": (8, 16), "autoencoder": "pixels", "max_steps": 4}
DRAW = {"seed": 0, "num_inference_steps": 2, "output_type": "pt"}


def settings(data: Path, output: Path, **changes: object) -> DenoiserSettings:
    return DenoiserSettings.load(None, {**SMALL, "data": str(data), "output": str(output), **changes})


@pytest.mark.parametrize("loss", ["simple", "hybrid"])
def test_nothing_is_told(pictures: Path, tmp_path: Path, loss: str) -> None:
    for file in pictures.glob("*.jsonl"):
        file.unlink()  # a folder of pictures without captions is enough
    out = train_denoiser(settings(pictures, tmp_path / "out", condition="none", loss=loss))
    pipeline = UnconditionalPipeline.from_pretrained(out)
    with Image.open(sorted((out / "training/samples").glob("*.png"))[-1]) as grid:
        assert grid.size == (8 * 18 - 2, 2 * 18 - 2)  # sixteen pictures of 16 pixels, and no captions
    assert pipeline.vqvae is None
    assert pipeline.scheduler.config.clip_sample
    assert pipeline.defaults["num_inference_steps"] == 2
    assert pipeline.unet.config.out_channels == (6 if loss == "hybrid" else 3)
    images = pipeline(2, **DRAW).images
    assert images.shape == (2, 3, 16, 16)
    assert torch.isfinite(images).all()
    assert "UnconditionalPipeline.from_pretrained" in (out / "README.md").read_text()


@pytest.mark.parametrize("cached", [True, False])
def test_a_class_is_told(labelled: Path, tmp_path: Path, cached: bool) -> None:
    adm = {"resnet_time_scale_shift": "scale_shift", "resample_type": "resnet"}
    given = settings(
        labelled, tmp_path / "out", condition="class", caption_column="colour", cache_latents=cached, **adm
    )
    pipeline = ClassConditionalPipeline.from_pretrained(train_denoiser(given))
    assert pipeline.id2label == dict(enumerate(sorted(["red", "green", "blue", "yellow", "purple", "orange"])))
    assert (pipeline.null_label, pipeline.unet.config.num_class_embeds) == (6, 7)
    assert pipeline("red", guidance_scale=2.0, **DRAW).images.shape == (1, 3, 16, 16)
    assert list((tmp_path / "out/training/samples").glob("*.png"))
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline('blue', seed=0)" in card
    assert "latentdiff generate --class blue --model" in card


@pytest.mark.slow
def test_it_learns_the_class(labelled: Path, tmp_path: Path) -> None:
    more = {"max_steps": 400, "batch_size": 8, "learning_rate": 2e-3, "ema_decay": 0.95, "sample_every": 400}
    given = settings(
        labelled, tmp_path / "out", condition="class", caption_column="colour", resolution=8, random_flip=False, **more
    )
    pipeline = ClassConditionalPipeline.from_pretrained(train_denoiser(given))
    red, blue = (
        pipeline(name, **{**DRAW, "num_inference_steps": 10}).images[0].mean((1, 2)) for name in ("red", "blue")
    )
    assert red[0] - red[2] > 0.2
    assert blue[2] - blue[0] > 0.2


def test_what_are_no_classes_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a picture is of one class, and this is of 2; name the column"):
        train_denoiser(settings(pictures, tmp_path / "a", condition="class"))
    with pytest.raises(ValueError, match="resample_type=resnet is for condition=class or none"):
        settings(pictures, tmp_path / "b", resample_type="resnet")
    rows = [{"file_name": f"{i}.png", "text": "same"} for i in range(4)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="all pictures are of the class 'same'; with condition=none"):
        train_denoiser(settings(pictures, tmp_path / "c", condition="class"))


def classifier_settings(data: Path, model: Path, output: Path, **changes: object) -> ClassifierSettings:
    small = {key: SMALL[key] for key in ("batch_size", "warmup_steps", "sample_steps", "norm_num_groups", "max_steps")}
    levels = {"block_out_channels": (8, 16), "attention_levels": (False, True), "attention_head_dim": 8}
    given = {"data": str(data), "model": str(model), "output": str(output), "caption_column": "colour"}
    return ClassifierSettings.load(None, {**small, **levels, **given, **changes})


@pytest.mark.parametrize("condition", ["class", "none"])
def test_a_classifier_joins_a_model(labelled: Path, tmp_path: Path, condition: str) -> None:
    model = train_denoiser(settings(labelled, tmp_path / "m", condition=condition, caption_column="colour"))
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    given = classifier_settings(labelled, model, tmp_path / "out")
    pipeline = ClassConditionalPipeline.from_pretrained(train_classifier(given))
    assert pipeline.classifier.config.sample_size == 16
    assert pipeline("red", classifier_scale=2.0, **DRAW).images.shape == (1, 3, 16, 16)
    assert {file: file.read_bytes() for file in model.rglob("*") if file.is_file()} == before
    rows = [json.loads(line) for line in (tmp_path / "out/training/metrics.jsonl").read_text().splitlines()]
    measured = next(row for row in rows if "val_loss" in row)
    assert 0 <= measured["val_accuracy"] <= 1
    assert {name for name in measured if name.startswith("val_accuracy_")}


@pytest.mark.slow
def test_a_classifier_learns(labelled: Path, tmp_path: Path) -> None:
    """It tells colours where there is little noise, and guides a model that knows nothing to them."""
    model = train_denoiser(settings(labelled, tmp_path / "m", condition="none", resolution=8, random_flip=False))
    more = {"max_steps": 300, "batch_size": 12, "learning_rate": 2e-3, "ema_decay": 0.9, "checkpoint_every": 300}
    pipeline = ClassConditionalPipeline.from_pretrained(
        train_classifier(classifier_settings(labelled, model, tmp_path / "out", **more))
    )
    red = torch.ones(1, 3, 8, 8)
    red[:, 1:, 1:7, 2:6] = -1  # on white
    with torch.no_grad():
        found = pipeline.classifier(red, 20).softmax(-1)[0]
    assert pipeline.id2label is not None
    assert pipeline.id2label[int(found.argmax())] == "red"


def test_a_classifier_for_what_cannot_be_guided(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder|no pipeline folder"):
        train_classifier(classifier_settings(labelled, tmp_path / "nothing", tmp_path / "out"))
    with pytest.raises(ValueError, match="emoji is no model without text"):
        train_classifier(classifier_settings(labelled, Path("emoji"), tmp_path / "out"))
    with pytest.raises(ValueError, match="caption_dropout"):
        classifier_settings(labelled, tmp_path, tmp_path / "out", caption_dropout=0.1)
