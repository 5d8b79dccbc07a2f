"""Looking at every picture once, keeping what was found, and what trainers get."""

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import pytest
from PIL import Image

from latentdiff.training.data import NoPicturesError, load_pictures, prepare_pictures
from latentdiff.training.data.survey import read_manifest, survey
from latentdiff.training.settings import AutoencoderSettings


def settings(data: Path, **more: Any) -> AutoencoderSettings:
    return AutoencoderSettings(data=str(data), output=str(data.parent / "out"), **more)


def manifest_of(data: Path, split: str = "train") -> Path:
    return data.parent / "out" / "training" / f"manifest-{split}.jsonl"


def test_pictures_have_digest_and_size(pictures: Path) -> None:
    found = prepare_pictures(settings(pictures))
    assert [p.captions for p in found] == [p.captions for p in load_pictures(str(pictures))]
    for i, picture in enumerate(found):
        assert picture.size == (20 + i, 16)
        assert picture.digest == hashlib.sha256((pictures / f"{i}.png").read_bytes()).hexdigest()
    assert len(prepare_pictures(settings(pictures), "validation")) == 2
    assert manifest_of(pictures, "validation").is_file()
    assert prepare_pictures(settings(pictures, split="validation"))[0].name == str(pictures / "10.png")
    with pytest.raises(NoPicturesError, match="no rows of split 'test'"):
        prepare_pictures(settings(pictures), "test")


def test_only_what_changed_is_decoded_again(pictures: Path) -> None:
    first = prepare_pictures(settings(pictures))
    written = manifest_of(pictures).stat().st_mtime_ns
    assert prepare_pictures(settings(pictures)) == first
    assert manifest_of(pictures).stat().st_mtime_ns == written
    # A record that is wrong on purpose tells where it was believed, and where the picture was looked at.
    text = manifest_of(pictures).read_text(encoding="ascii")
    manifest_of(pictures).write_text(text.replace('"height": 16', '"height": 99'), encoding="ascii")
    believed = [(20 + i, 99) for i in range(10)]
    assert [p.size for p in prepare_pictures(settings(pictures))] == believed
    os.utime(pictures / "1.png", (1, 1))  # another time, the same bytes
    assert [p.size for p in prepare_pictures(settings(pictures))] == believed
    before = (pictures / "2.png").stat()
    content = hostile.encode(Image.new("RGB", (22, 18), "white"))
    assert len(content) < before.st_size
    (pictures / "2.png").write_bytes(content.ljust(before.st_size, b"\0"))  # other bytes, but size and time as before
    os.utime(pictures / "2.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (pictures / "3.png").write_bytes(hostile.encode(hostile.noise(0, 30, 31)))
    again = prepare_pictures(settings(pictures))
    assert [p.size for p in again] == [*believed[:2], (22, 18), (30, 31), *believed[4:]]
    assert [p.digest for p in again[2:4]] != [p.digest for p in first[2:4]]


def test_a_spoilt_record_is_made_anew(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare_pictures(settings(pictures))
    for spoilt in (b"", b"\xff\xfe", b"[]\n", b'{"format": "latentdiff manifest 1"}\n{"name": 3}\n', b"[" * 100_000):
        manifest_of(pictures).write_bytes(spoilt)
        assert prepare_pictures(settings(pictures)) == first
        assert len(read_manifest(manifest_of(pictures))) == 10
    assert "all pictures are examined again" in caplog.text
    assert [path.name for path in manifest_of(pictures).parent.iterdir()] == ["manifest-train.jsonl"]


def test_bad_pictures_are_left_out_counted_and_named(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pictures / "4.png").write_bytes((pictures / "4.png").read_bytes()[:60])
    with caplog.at_level(logging.INFO):
        assert len(prepare_pictures(settings(pictures, max_bad_share=0.1))) == 9
    assert f"left out: {pictures / '4.png'}: cannot be read as a picture" in caplog.text
    assert "9 pictures, 1 left out" in caplog.text
    (pictures / "5.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 10 pictures cannot be used, more than a share of 0.1 ") as error:
        prepare_pictures(settings(pictures))
    assert "4.png: cannot be read" in str(error.value)
    assert "5.png: cannot be read as a picture (the file is empty)" in str(error.value)
    assert len(prepare_pictures(settings(pictures, max_bad_share=0.2))) == 8


def test_nothing_usable_is_an_error(pictures: Path) -> None:
    for i in range(10):
        (pictures / f"{i}.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="nothing is left to train on"):
        prepare_pictures(settings(pictures, max_bad_share=1.0))


def test_a_manifest_says_what_to_leave_out(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_pictures(settings(pictures))
    rows = [json.loads(line) for line in manifest_of(pictures).read_text().splitlines()]
    for row in rows:
        if row.get("name") in ("3.png", "4.png"):
            row["use"] = False
    chosen = pictures.parent / "chosen.jsonl"
    chosen.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (pictures / "4.png").write_bytes(b"")  # known to be left out, so not counted as bad
    found = prepare_pictures(settings(pictures, manifest=str(chosen), max_bad_share=0.0))
    assert [Path(p.name).stem for p in found] == ["0", "1", "2", "5", "6", "7", "8", "9"]
    moved = pictures.rename(pictures.parent / "moved")
    assert len(prepare_pictures(settings(moved, manifest=str(chosen), max_bad_share=0.0))) == 8
    chosen.write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"chosen\.jsonl, line 1: not a line of a manifest"):
        prepare_pictures(settings(moved, manifest=str(chosen)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare_pictures(settings(moved, manifest="nowhere.jsonl"))


def test_captions_may_not_be_needed(pictures: Path) -> None:
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="12 of 12 pictures cannot be used"):
        prepare_pictures(settings(pictures))
    assert len(prepare_pictures(settings(pictures), condition="none")) == 12
    assert {p.captions for p in prepare_pictures(settings(pictures, caption="a disc"))} == {("a disc",)}


def test_interrupted_surveys_keep_what_they_found(pictures: Path) -> None:
    found = load_pictures(str(pictures))
    kept: list[int] = []

    class Interrupting:
        def __call__(self) -> bytes:
            raise KeyboardInterrupt

    many = [*(found * 60)[:512], replace(found[0], read=Interrupting())]
    with pytest.raises(KeyboardInterrupt):
        survey(many, [str(i) for i in range(len(many))], keep=lambda entries: kept.append(len(entries)))
    assert kept == [512]


def test_a_run_does_not_go_on_with_other_pictures(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_pictures(settings(pictures))
    others = tmp_path / "others"
    others.mkdir()
    for i in range(12):
        (others / f"{i}.png").write_bytes(hostile.encode(hostile.noise(i, 16, 16)))
        (others / f"{i}.txt").write_text("a thing")
    run = {"data": str(others), "output": str(pictures.parent / "out")}
    assert len(prepare_pictures(AutoencoderSettings(**run))) == 12  # there is no checkpoint, so no run yet
    prepare_pictures(settings(pictures))
    (pictures.parent / "out" / "training" / "checkpoints" / "step-00000001").mkdir(parents=True)
    before = manifest_of(pictures).read_bytes()
    for _ in range(2):  # what was refused is not what the run has had from now on
        with pytest.raises(
            ValueError, match=r"out holds a run on other pictures: 0 of its 10 are in .*others\. Choose"
        ):
            prepare_pictures(AutoencoderSettings(**run))
        assert manifest_of(pictures).read_bytes() == before
    for i in range(4):  # fewer than half are gone, others have come
        (pictures / f"{i}.png").write_bytes((others / f"{i}.png").read_bytes())
    assert "not those" not in caplog.text
    assert len(prepare_pictures(settings(pictures))) == 10
    assert "the pictures are not those that this run had so far" in caplog.text
    assert caplog.text.count("(gone: 4, new: 4)") == 1
