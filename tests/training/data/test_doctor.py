"""``latentdiff doctor``: the report, the manifest, the exit status."""

import json
import os
from pathlib import Path

import hostile
import pytest
import typer
from click.testing import Result
from huggingface_hub import constants
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from latentdiff.interchange.folders import packaged_model
from latentdiff.interchange.hub import HubError
from latentdiff.pipelines.commands.models import model_shape
from latentdiff.training.commands.doctor import configs_of, doctor
from latentdiff.training.data import prepare_pictures, prepare_splits
from latentdiff.training.settings import AutoencoderSettings

app = typer.Typer()
app.command()(doctor)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.png").write_bytes(hostile.encode(hostile.noise(i, 80 + 40 * (i % 3), 80)))
        (folder / f"{i:02}.txt").write_text(f"picture number {i % 20}", encoding="utf-8")
    (folder / "30.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "30.txt").write_text("again " * 100, encoding="utf-8")
    return folder


def test_a_good_folder(album: Path) -> None:
    before = hostile.state(album.parent)
    result = run(album, "resolution=64")
    assert result.exit_code == 0, result.output
    assert "31 pictures: 31 can be used, 0 cannot." in result.output
    assert "byte for byte: 1 group, 2 pictures\n  00.png, 30.png" in result.output
    assert "31 captions of 31 pictures: 3 to 100 words, median 3" in result.output
    assert '10 captions stand with more than one picture: "picture number 0" (2)' in result.output
    assert "1 caption of more than 77 words; text encoders mostly cut them:\n    30.png (100 words)" in result.output
    assert "Sizes: from 80 x 80 to 160 x 80, median 120 x 80" in result.output
    assert "64 x 64       11  ####" in result.output
    assert "More than a third is cropped away of 10 as squares, and of 0 with buckets." in result.output
    assert "Everything can be used." in result.output
    assert hostile.state(album.parent) == before


def test_the_exit_status_is_whether_training_would_go_on(album: Path) -> None:
    (album / "01.png").write_bytes(b"")
    (album / "02.txt").unlink()
    result = run(album)
    assert result.exit_code == 0
    assert "Cannot be used (2):\n  02.png: no caption; write one" in result.output
    assert "  01.png: cannot be read as a picture (the file is empty)" in result.output
    result = run(album, "max_bad_share=0.05")
    assert result.exit_code == 1
    assert "6.45 % of the pictures cannot be used; training stops above 5 %" in result.output
    for file in album.glob("*.txt"):
        file.unlink()
    result = run(album)
    assert result.exit_code == 1
    assert "31 alike, 00.png, 01.png, 02.png and so on; the first: no caption; write one into 00.txt" in result.output
    assert "There is nothing to train on." in result.output


def test_the_manifest_is_honoured_and_remembers_choices(album: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "album.jsonl"
    (album / "01.png").write_bytes(b"")
    assert "nowhere" not in run(album, "--manifest", manifest).output
    header, *rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert header["format"] == "latentdiff manifest 1"
    assert [row["name"] for row in rows] == [f"{i:02}.png" for i in range(31)]
    assert [row["name"] for row in rows if not row["use"]] == ["01.png"]
    rows[5]["use"] = False
    manifest.write_text("\n".join(map(json.dumps, [header, *rows])), encoding="utf-8")
    assert run(album, "--manifest", manifest, "--drop-duplicates").exit_code == 0
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][1:]
    assert [row["name"] for row in rows if not row["use"]] == ["01.png", "05.png", "30.png"]
    assert rows[30]["warnings"] == ["the same as 00.png"]
    settings = AutoencoderSettings(
        data=str(album), output=str(tmp_path / "out"), manifest=str(manifest), max_bad_share=0
    )
    assert len(prepare_pictures(settings)) == 28


def test_other_files_are_not_overwritten(album: Path) -> None:
    before = hostile.state(album)
    for name in ("00.txt", "00.png"):
        result = run(album, "--manifest", album / name)
        assert isinstance(result.exception, ValueError)
        assert "it is not overwritten" in str(result.exception)
    assert "is a folder" in str(run(album, "--manifest", album).exception)
    os.mkfifo(album.parent / "pipe")
    assert "a pipe or a device" in str(run(album, "--manifest", album.parent / "pipe").exception)
    assert "name one with --manifest" in str(run(album, "--drop-duplicates").exception)
    assert hostile.state(album) == before


def test_both_splits_and_what_no_table_lists(pictures: Path) -> None:
    (pictures / "unlisted.png").write_bytes(hostile.encode(hostile.noise(0)))
    result = run(pictures)
    assert result.exit_code == 0
    assert "12 pictures: 12 can be used" in result.output
    assert "Training takes 10 and measures on 2, of the split 'validation'." in result.output
    assert "unlisted.png: is in the folder, but not in metadata.jsonl" in result.output
    assert "12 with a side below resolution=128 will be enlarged" in result.output
    assert "2 pictures: 2 can be used" in run(pictures, "split=validation").output


def test_how_many_are_measured_on(tmp_path: Path) -> None:
    for i in range(60):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    said = run(tmp_path, "condition=none").output
    settings = AutoencoderSettings(data=str(tmp_path), output=str(tmp_path / "out"))
    train, held_out = prepare_splits(settings, "none")
    assert 0 < len(held_out) < 10
    assert f"Training takes {len(train)} and measures on {len(held_out)}, chosen by their content" in said
    for i in range(30):
        (tmp_path / f"{i}.png").unlink()
    said = run(tmp_path, "condition=none").output
    assert "Training takes all 30 and measures on none: there is no split 'validation'." in said
    assert "measures on" not in run(tmp_path, "condition=none", "split=all").output


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_tables_that_are_no_files(tmp_path: Path) -> None:
    for name in ("pipe", "device", "nothing", "folder"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
        (tmp_path / name / "1.txt").write_text("a cup")
    os.mkfifo(tmp_path / "pipe" / "metadata.jsonl")
    (tmp_path / "device" / "metadata.jsonl").symlink_to("/dev/zero")
    (tmp_path / "nothing" / "metadata.csv").symlink_to("not-there.csv")
    (tmp_path / "folder" / "metadata.parquet").mkdir()
    said = run(tmp_path).output
    assert "pipe/metadata.jsonl: is not read: it is a pipe or device, not a file" in said
    assert "device/metadata.jsonl: is not read: it is a pipe or device, not a file" in said
    assert "nothing/metadata.csv: is not read: it is a link to nothing, not a file" in said
    assert "folder/metadata.parquet: is not read: it is a folder, not a file" in said
    assert "4 pictures: 4 can be used" in said


def test_tokens_are_counted_as_a_model_does(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(album, "--model", "emoji")
    assert result.exit_code == 0, result.output
    assert "1 caption will be cut:\n    30.png (" in result.output
    assert "Shapes, with buckets=true at resolution=128" in result.output
    assert isinstance(run(album, "--model", "no-such-model").exception, FileNotFoundError)


def test_a_model_that_cannot_hold_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise").mkdir()
    for i in range(3):
        (tmp_path / "noise" / f"{i}.png").write_bytes(hostile.encode(hostile.noise(i, 128, 128)))
    options = ("noise", "--model", "emoji", "caption=noise")
    for _ in range(2):  # its own sheet may be written again
        result = run(*options)
        assert result.exit_code == 0, result.output
    assert "gives 3 of these pictures back, at 128x128, with" in result.output
    assert "emoji cannot hold these pictures" in result.output
    assert "a Stable Diffusion 1 or 2 folder or hub id (--model)" in result.output
    sheet = Image.open("reconstructions.png")
    assert sheet.height > 3 * 128
    sheet.save("reconstructions.png")  # without what latentdiff wrote in it
    assert "reconstructions.png exists and was not written by latentdiff doctor" in str(run(*options).exception)
    assert run(*options, "--sheet", "other.png").exit_code == 0
    assert run(*options, "--sheet", tmp_path / "noise" / "0.png").exit_code == 1


def test_drawings_of_the_packaged_models_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    for i, colour in enumerate(("#ffcc22", "#dd2e44", "#55acee")):
        face = Image.new("RGB", (512, 512), "white")
        draw = ImageDraw.Draw(face)
        draw.ellipse((20, 20, 492, 492), fill=colour)
        for x in (150, 300):
            draw.ellipse((x, 150, x + 60, 240), fill="#664500")
        draw.chord((130, 250, 380, 420), 0, 180, fill="#664500")
        face.resize((128, 128), Image.Resampling.LANCZOS).save(tmp_path / "faces" / f"{i}.png")
    output = run("faces", "--model", "emoji", "caption=a face").output
    assert "gives 3 of these pictures back" in output
    assert "these pictures poorly" not in output
    assert "cannot hold" not in output


def test_the_size_that_fine_tuning_takes(album: Path, tmp_path: Path) -> None:
    config = tmp_path / "doctor.yaml"
    config.write_text("max_bad_share: 0.2\n", encoding="utf-8")
    packaged, _ = model_shape(packaged_model())
    for options in ((), ("--config", config)):
        assert f"with buckets=true at resolution={packaged}:" in run(album, *options).output
    config.write_text("resolution: 32\n", encoding="utf-8")
    assert "at resolution=32:" in run(album, "--config", config).output
    assert "at resolution=48:" in run(album, "--config", config, "resolution=48").output


def test_mistakes_are_explained(album: Path, tmp_path: Path) -> None:
    assert "unknown setting 'resolutoin'; did you mean 'resolution'" in str(run(album, "resolutoin=3").exception)
    assert isinstance(run(tmp_path / "nowhere").exception, FileNotFoundError)


def test_folders_that_are_classes(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(hostile.encode(hostile.noise(len(name))))
    assert "3 pictures: 0 can be used, 3 cannot." in run(tmp_path).output
    assert "3 pictures: 3 can be used, 0 cannot." in run(tmp_path, "condition=class").output
    assert "3 pictures: 3 can be used, 0 cannot." in run(tmp_path, "condition=none").output


def test_a_model_on_the_hub_is_judged_at_its_own_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--one" / "snapshots" / "abc"
    for part, config in (("unet", {"sample_size": 96}), ("vae", {"block_out_channels": [8, 8, 8, 8]})):
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / "config.json").write_text(json.dumps(config))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_shape(configs_of("some/one")) == (768, 8)
    with pytest.raises(HubError, match=r"^some/other is not on this machine, and the hub cannot be reached"):
        configs_of("some/other")
