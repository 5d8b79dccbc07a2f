"""What is said about pictures without captions."""

import json
import logging
from pathlib import Path

import hostile
import pytest
from typer.testing import CliRunner

from latentdiff.cli import application
from latentdiff.training.data import prepare_pictures
from latentdiff.training.settings import FinetuneSettings


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(hostile.encode(hostile.noise(len(name))))


def doctor(folder: Path, *settings: str) -> str:
    return CliRunner().invoke(application(), ["doctor", str(folder), *settings]).output


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("captions.csv", "metadata.csv"),
        ("metadata.json", "metadata.jsonl"),
        ("Prompts.jsonl", "metadata.jsonl"),
        ("labels.parquet", "metadata.parquet"),
        ("1.jpeg.txt", "1.txt"),
        ("1.jpeg.caption", "1.caption"),
    ],
)
def test_files_that_are_named_otherwise(tmp_path: Path, wrong: str, right: str) -> None:
    add(tmp_path, "1.jpeg", "2.jpeg")
    (tmp_path / wrong).write_text(json.dumps([{"file_name": "1.jpeg", "text": "a"}]))
    assert f"{wrong} is not read; did you mean {right}?" in doctor(tmp_path)
    assert "did you mean" not in doctor(tmp_path, "caption=a thing")


def test_other_files_and_captioned_pictures_are_not_spoken_of(tmp_path: Path) -> None:
    add(tmp_path, "1.png")
    (tmp_path / "prices.csv").write_text("a,b\n1,2\n")
    output = doctor(tmp_path)
    assert "did you mean" not in output
    assert "classes" not in output
    assert "One caption for all pictures that have none, in a training: caption='a photo of sks dog'" in output
    (tmp_path / "1.txt").write_text("a thing")
    assert "caption=" not in doctor(tmp_path)


def test_folders_may_be_classes(tmp_path: Path) -> None:
    add(tmp_path, "cat/1.png", "dog/1.png")
    add(tmp_path, *(f"cat/{i}.png" for i in range(2, 30)))
    said = doctor(tmp_path)
    assert "Are the folders (cat, dog) classes? A training with condition=class takes their names" in said
    command = f"latentdiff train denoiser --data {tmp_path} --autoencoder emoji --output runs/classes condition=class"
    assert command in said.partition("Cannot be used (30)")[0]  # the question, then what is wrong
    assert "  30 alike, cat/1.png, cat/10.png, cat/11.png and so on; the first: no caption" in said
    assert "cat/12.png" not in said
    assert "classes?" not in doctor(tmp_path, "condition=class")


def test_training_says_it_too_and_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "latentdiff")
    add(tmp_path, "data/1.png", "data/2.png")
    (tmp_path / "data" / "captions.csv").write_text("file_name,text\n1.png,a\n")
    settings = FinetuneSettings(data=str(tmp_path / "data"), output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"did you mean metadata\.csv") as failure:
        prepare_pictures(settings)
    assert str(failure.value).count("2.png: no caption") == 1
    assert "no caption" not in caplog.text
