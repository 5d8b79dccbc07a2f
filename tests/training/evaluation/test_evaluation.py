"""``latentdiff evaluate``: with a tiny pipeline, and from the command line with the packaged model."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from tiny_clip import save_clip
from typer.testing import CliRunner

from latentdiff.interchange.png import read_settings
from latentdiff.metrics.clip import load_clip
from latentdiff.metrics.distribution_distances import frechet_distance
from latentdiff.metrics.extractors import load_extractor
from latentdiff.training.card.card import write_model_card
from latentdiff.training.card.kinds import text_to_image_kind
from latentdiff.training.data import load_pictures
from latentdiff.training.drawings import Drawing
from latentdiff.training.evaluation.evaluate import Measured, caption_of, evaluate_pipeline, markdown, plan, set_metrics
from latentdiff.training.settings import EvaluationSettings


@pytest.fixture(autouse=True)
def _no_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in this machine's cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pipeline folder with a card of ours."""
    folder = tmp_path / "model"
    tiny_pipeline().save_pretrained(folder)
    write_model_card(folder, kind=text_to_image_kind(), settings={}, figures={}, pictures=10, steps=1)
    return folder


def evaluate(model: Path, data: Path, **options: Any) -> dict[str, Any]:
    settings = EvaluationSettings(**{"model": str(model), "data": str(data), "split": "train", **options})
    return evaluate_pipeline(tiny_pipeline(), settings)


def drawn_at(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in sorted(folder.glob("*.png"))}


def test_the_report(model: Path, pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "latentdiff")
    (model / "training").mkdir()
    (model / "training" / "settings.yaml").write_text(f"data: {pictures}\n", encoding="utf-8")
    report = evaluate(model, pictures)
    assert "how well it remembers" in caplog.text
    assert "pictures of training, and what was drawn" in caplog.text
    output = model / "evaluation"
    assert json.loads((output / "evaluation.json").read_text(encoding="utf-8")) == report
    assert report["data"] == {"name": "pictures", "split": "train", "pictures": 10, "left_out": 0}
    assert report["drawn"] == {
        "pictures": 10,
        "seed": 0,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "scheduler": "DDIMScheduler",
        "precision": "float32",
        "height": 16,
        "width": 16,
    }
    assert report["extractor"]["dimensions"] == 528
    assert len(report["extractor"]["weights_sha256"]) == 64
    names = {"frechet_distance", "kernel_distance", "precision", "recall", "reconstruction_psnr", "reconstruction_ssim"}
    assert set(report["metrics"]) == names  # no "fid": this is not the Inception network
    assert any("too few for 528 dimensions" in note for note in report["notes"])
    assert any("no CLIP score" in note for note in report["notes"])
    assert str(model.parent) not in (output / "evaluation.json").read_text(encoding="utf-8")
    assert "Fréchet distance (not FID)" in caplog.text
    assert "  precision" not in caplog.text
    assert "| recall |" not in markdown(report)
    assert "note: precision and recall of 10 pictures are chance" in caplog.text
    many = {**report, "data": {**report["data"], "pictures": 200}, "drawn": {**report["drawn"], "pictures": 200}}
    assert "| recall |" in markdown(many)

    # The figure is that of the very files.
    extractor = load_extractor("autoencoder")
    drawn = [Image.open(file) for file in sorted((output / "samples").glob("*.png"))]
    found = load_pictures(str(pictures))
    real = list(Measured(found, [], 16, 16).real())
    expected = frechet_distance(extractor.features(drawn), extractor.features(real))
    assert report["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)

    # The sheet has a held-out picture of each caption above what was drawn of it.
    sheet = np.array(Image.open(output / "comparison.png"))
    caption = read_settings(output / "samples" / "000000.png")["prompts"][0]
    (original,) = [np.array(image) for image, one in zip(real, found, strict=True) if caption in one.captions][:1]
    left = 130 + 32  # beside the names of the rows, in the middle of a cell
    assert np.array_equal(sheet[:64:4, left : left + 64 : 4], original)
    assert np.array_equal(sheet[64:128:4, left : left + 64 : 4], np.array(drawn[0].convert("RGB")))
    assert str(output / "comparison.png") in caplog.text

    card = (model / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation" in card
    assert f"| Fréchet distance (not FID), of too few pictures | {report['metrics']['frechet_distance']:.6g} |" in card


def test_pictures_are_drawn_for_captions_and_kept(model: Path, pictures: Path, tmp_path: Path) -> None:
    samples = tmp_path / "out" / "samples"
    first = evaluate(model, pictures, count=3, output=str(tmp_path / "out"))
    before = drawn_at(samples)
    settings = read_settings(samples / "000001.png")
    assert settings is not None
    image = tiny_pipeline()(settings["prompts"], seed=settings["seed"]).images[0]
    assert image.tobytes() == Image.open(samples / "000001.png").convert("RGB").tobytes()
    captions = {caption for picture in load_pictures(str(pictures)) for caption in picture.captions}
    assert settings["prompts"][0] in captions

    again = evaluate(model, pictures, count=3, output=str(tmp_path / "out"), batch_size=2)
    assert drawn_at(samples) == before
    assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-4)
    (samples / "000002.png").unlink()  # as if stopped before it
    evaluate(model, pictures, count=5, output=str(tmp_path / "out"))
    after = drawn_at(samples)
    assert len(after) == 5
    assert [after[name] == before[name] for name in before] == [True, True, False]
    evaluate(model, pictures, count=5, output=str(tmp_path / "out"), guidance=1.5)
    assert not set(drawn_at(samples).values()) & set(after.values())


def test_other_weights_are_drawn_anew(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "latentdiff")
    pipeline = tiny_pipeline()
    options = {"model": "emoji", "data": str(pictures), "split": "train", "count": 2, "output": str(tmp_path / "out")}
    evaluate_pipeline(pipeline, EvaluationSettings(**options))
    assert "real pictures, and what was drawn" in caplog.text
    assert "trained on" not in caplog.text  # the model never saw them
    before = drawn_at(tmp_path / "out" / "samples")
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    evaluate_pipeline(pipeline, EvaluationSettings(**options))
    assert not set(drawn_at(tmp_path / "out" / "samples").values()) & set(before.values())


def test_spoilt_pictures_are_not_measured(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline()
    pipeline.unet.conv_out.bias.data.fill_(math.nan)
    options = {"model": "emoji", "data": str(pictures), "split": "train", "count": 2, "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"000000\.png, or one drawn with it, would be spoilt: a network gave values"):
        evaluate_pipeline(pipeline, EvaluationSettings(**options))
    assert "The unet gave values that are not finite" in caplog.text
    assert drawn_at(tmp_path / "out" / "samples") == {}


def test_plan(pictures: Path, tmp_path: Path) -> None:
    found = load_pictures(str(pictures))
    drawings = plan(found, 25, 7, tmp_path, {"steps": 2})
    assert plan(found, 4, 7, tmp_path, {"steps": 2}) == drawings[:4]
    assert plan(found, 4, 8, tmp_path, {"steps": 2}) != drawings[:4]
    assert [drawing.settings["seed"] for drawing in drawings] == list(range(7, 32))
    firsts, seconds = ([caption_of(drawing) for drawing in part] for part in (drawings[:10], drawings[10:20]))
    assert sorted(firsts) == sorted(picture.captions[0] for picture in found)
    assert sorted(seconds) == sorted(picture.captions[1] for picture in found)
    assert [caption_of(drawing) for drawing in drawings[20:]] == firsts[:5]


def test_nothing_of_somebody_else_is_changed(model: Path, pictures: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("# Mine\n", encoding="utf-8")
    evaluate(model, pictures, count=2)
    assert (model / "README.md").read_text(encoding="utf-8") == "# Mine\n"

    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(out / "samples" / "000001.png")
    mine = (out / "samples" / "000001.png").read_bytes()
    with pytest.raises(FileExistsError, match="was not drawn by latentdiff"):
        evaluate(model, pictures, count=2, output=str(out))
    assert (out / "samples" / "000001.png").read_bytes() == mine
    shutil.rmtree(out)
    out.mkdir()
    (out / "evaluation.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(FileExistsError, match="was not written by latentdiff evaluate"):
        evaluate(model, pictures, output=str(out))
    assert [file.name for file in out.iterdir()] == ["evaluation.json"]
    (out / "evaluation.json").rename(out / "comparison.png")
    with pytest.raises(FileExistsError, match=r"comparison\.png exists and was not written by latentdiff evaluate"):
        evaluate(model, pictures, output=str(out))
    assert [file.name for file in out.iterdir()] == ["comparison.png"]


def test_bad_pictures_are_left_out(model: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "3.png").write_bytes(b"no picture")
    report = evaluate(model, pictures, count=2, output=str(tmp_path / "out"))
    assert (report["data"]["pictures"], report["data"]["left_out"]) == (9, 1)


def test_what_cannot_be_evaluated(model: Path, pictures: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--split train, which a model has seen"):
        evaluate(model, pictures, split="test")
    with pytest.raises(ValueError, match="say with --output"):
        EvaluationSettings(model="emoji", data=str(pictures)).folder()
    with pytest.raises(FileNotFoundError, match="--extractor takes"):
        evaluate(model, pictures, extractor="/no/such")
    assert not (model / "evaluation").exists()


def test_very_few_pictures(model: Path, pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "latentdiff")
    report = evaluate(model, pictures, split="validation")
    assert "held-out pictures, and what was drawn" in caplog.text
    assert "remembers" not in caplog.text
    assert "precision" not in report["metrics"]
    assert any("no precision and recall" in note for note in report["notes"])


def test_clip_score_and_another_extractor(model: Path, pictures: Path, tmp_path: Path) -> None:
    clip = str(save_clip(tmp_path / "clip"))
    report = evaluate(model, pictures, clip=clip, extractor=clip)
    assert report["extractor"]["dimensions"] == 8
    assert report["clip"]["name"] == report["extractor"]["name"] == "transformers CLIPModel clip"
    assert not any("too few" in note or "CLIP score" in note for note in report["notes"])
    scorer = load_clip(clip)
    files = sorted((model / "evaluation" / "samples").glob("*.png"))
    captions = [(read_settings(file) or {})["prompts"][0] for file in files]
    expected = scorer.scores([Image.open(file) for file in files], captions).mean()
    assert report["metrics"]["clip_score"] == pytest.approx(float(expected), abs=1e-3)
    card = (model / "README.md").read_text(encoding="utf-8")
    assert "| CLIP score |" in card
    assert "| Fréchet distance (not FID) |" in card  # of enough pictures for 8 dimensions
    assert "CLIP: transformers CLIPModel clip" in card


def test_only_inception_gives_fid(pictures: Path, tmp_path: Path) -> None:
    found = load_pictures(str(pictures))
    drawings = []
    for i, image in enumerate(Measured(found, [], 16, 16).real()):
        image.rotate(90).save(tmp_path / f"{i}.png")
        drawings.append(Drawing(tmp_path / f"{i}.png", {"prompts": [""], "seed": i}))
    extractor = load_extractor("autoencoder")
    extractor.is_fid = True
    notes: list[str] = []
    metrics = set_metrics(Measured(found, drawings, 16, 16), extractor, 4, notes)
    assert set(metrics) == {"fid", "kid", "precision", "recall"}
    assert not any("not FID" in note for note in notes)
    assert "| FID, of too few pictures |" in markdown(
        {
            "metrics": metrics,
            "data": {"pictures": 10, "name": "x", "split": "train"},
            "drawn": {
                "pictures": 10,
                "width": 16,
                "height": 16,
                "seed": 0,
                "num_inference_steps": 2,
                "scheduler": "DDIMScheduler",
                "guidance_scale": 3.0,
                "precision": "float32",
            },
            "extractor": {**extractor.describe(), "dimensions": 528},
            "clip": None,
            "notes": notes,
            "made_by": "latentdiff",
        }
    )


def test_the_command(pictures: Path, tmp_path: Path) -> None:
    from latentdiff.cli import application

    app = application()
    out = tmp_path / "out"
    arguments = ["evaluate", "emoji", "--data", str(pictures), "--split", "train", "--count", "6", "--steps", "2"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert str(out / "evaluation.json") in result.output
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert report["drawn"]["num_inference_steps"] == 2
    assert report["model"]["name"] == "emoji"
    assert len(list((out / "samples").glob("*.png"))) == 6
    assert all(math.isfinite(value) for value in report["metrics"].values())
    missing = CliRunner().invoke(app, arguments)
    assert "say with --output" in str(missing.exception)
