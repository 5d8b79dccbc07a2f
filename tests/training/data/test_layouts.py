"""Folders as people have them: splits, nested tables, kinds of pictures, names written otherwise."""

import base64
import json
import struct
import tarfile
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from latentdiff.training.commands.doctor import doctor
from latentdiff.training.data import NoPicturesError, Source, Wanted, load_pictures, prepare_pictures, read_source
from latentdiff.training.data.decode import decode, why_unreadable
from latentdiff.training.data.doctor import examine_source
from latentdiff.training.settings import AutoencoderSettings, DoctorSettings

HEIC = (
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0004eZDn*}000000000XXk=`10000000000aA{+700000000000000000000B57=IV*mgE07O6l0R"
    "RC200001pa1~?00000001)p001LtX>Mi!000000RR916=`l}WdZ;I000310BCk&F#rGn01j|zbZr0t000010002|X>f9I0002oX>en20001WXm(>"
    "m0RwOV0058x000009`FGC{rLC*01pFT0096PKmiN^|NjGU00093kN^M!000939=ZZRVE_RDDMA4O18@KU0|1Z!00RI30{|YNAb|yz>aLpR;31&Ef"
    "B*mtfB*mk0EA)y0RRR>0l{;@i2wiq6Ju{|a&BX6cmM$a4FCp!0000KX>)L8000000000$0000$0000eV{Bn?0000G000010000G00001|NsBc000"
    "02|NsBc000020000GaA|mH000000|*ER0000OX>e^}0000000001009Mo0s{qv0000xZDe6|0000lC;_h%A!K7f^(P|#|7h}``YIX!Z1z}L+^&GZ"
    "Tk`tA_GFvD^Qw`afQM<PFco+"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def fill(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(hostile.encode(hostile.noise(i)))


def table(file: Path, *names: str, **more: Any) -> None:
    file.write_text("\n".join(json.dumps({"file_name": name, "text": f"of {name}", **more}) for name in names))


def read(folder: Path, **wanted: Any) -> Source:
    return read_source(str(folder), Wanted(**wanted))


def names(folder: Path, **wanted: Any) -> list[str]:
    found = read(folder, **wanted)
    return [found.key(picture.name) for picture in found.pictures]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("held_out", ["validation", "val", "Valid", "dev"])
def test_split_folders_with_a_table_each(tmp_path: Path, kind: str, held_out: str) -> None:
    for folder, name in (("train", "a"), (held_out, "b"), ("test", "c")):
        fill(tmp_path, f"{folder}/{name}.png")
        file = tmp_path / folder / f"metadata.{kind}"
        if kind == "jsonl":
            table(file, f"{name}.png")
        elif kind == "csv":
            file.write_text(f"file_name,text\n{name}.png,a caption\n")
        else:
            pq.write_table(pa.table({"file_name": [f"{name}.png"], "text": ["a caption"]}), file)
    assert names(tmp_path) == ["train/a.png"]
    assert names(tmp_path, split="validation") == names(tmp_path, split="val") == [f"{held_out}/b.png"]
    assert names(tmp_path, split="test") == ["test/c.png"]
    with pytest.raises(NoPicturesError, match="no pictures of split 'more'; its splits: test, train, validation"):
        read(tmp_path, split="more")


def test_one_table_above_split_folders(tmp_path: Path) -> None:
    """As `datasets` #4548 has it: what a row does not say, its picture's folder does."""
    fill(tmp_path, "train/a.png", "test/b.png", "val/c.png", "val/d.png")
    rows = [{"file_name": f"{name}.png", "text": "x"} for name in ("train/a", "test/b", "val/c")]
    rows.append({"file_name": "val/d.png", "text": "x", "split": "train"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert names(tmp_path) == ["train/a.png", "val/d.png"]
    assert names(tmp_path, split="validation") == ["val/c.png"]
    moved = tmp_path / "moved"
    fill(moved, "images/train/a.png", "images/val/b.png")
    table(moved / "metadata.jsonl", "images\\train\\a.png", "images\\val\\b.png")
    assert names(moved) == ["images/train/a.png"]
    assert names(moved, split="validation") == ["images/val/b.png"]


def test_splits_below_the_only_folder_and_beside_others(tmp_path: Path) -> None:
    fill(tmp_path, "images/train/a.png", "images/val/b.png")
    assert names(tmp_path, caption="x") == ["images/train/a.png"]
    assert names(tmp_path, caption="x", split="validation") == ["images/val/b.png"]
    fill(tmp_path / "kinds", "cat/a.png", "dog/b.png", "validation/cat/c.png", "val/d.png")
    assert names(tmp_path / "kinds", condition="class") == ["cat/a.png", "dog/b.png", "val/d.png"]
    held_out = read(tmp_path / "kinds", condition="class", split="validation")
    assert [picture.captions for picture in held_out.pictures] == [("cat",)]
    fill(tmp_path / "lone", "test/a.png")  # no split: there is nothing that it could be held out from
    assert names(tmp_path / "lone", caption="x") == ["test/a.png"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_clone_of_a_hub_folder(tmp_path: Path, streaming: bool) -> None:
    for split, colours in (("train", ["red", "blue"]), ("validation", ["green"])):
        columns = {"image": [Image.new("RGB", (8, 8), c) for c in colours], "text": colours}
        kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        dataset = datasets.Dataset.from_dict(columns, features=kinds)
        dataset.to_parquet(str(tmp_path / "clone" / "data" / f"{split}-00000-of-00001.parquet"))
    (tmp_path / "clone" / "README.md").write_text("# mine")
    more: dict[str, Any] = {"streaming": streaming, "cache_dir": tmp_path / "copy"}
    for split, want in (("train", ["red", "blue"]), ("validation", ["green"]), ("val", ["green"])):
        assert [p.captions[0] for p in load_pictures(str(tmp_path / "clone"), split, **more)] == want
    with pytest.raises(NoPicturesError, match="no split 'test'; it has train, validation"):
        load_pictures(str(tmp_path / "clone"), "test", **more)
    settings = AutoencoderSettings(data=str(tmp_path / "clone"), output=str(tmp_path / "out"), streaming=streaming)
    assert len(prepare_pictures(settings, "validation")) == 1


def test_shards_that_say_their_split(tmp_path: Path) -> None:
    fill(tmp_path, "0.png")
    (tmp_path / "0.txt").write_text("x")
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("train-000", "train-001", "val-000"):
        with tarfile.open(shards / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / "0.png", f"{name}.png")
            archive.add(tmp_path / "0.txt", f"{name}.txt")
    assert names(shards) == ["train-000.tar/train-000.png", "train-001.tar/train-001.png"]
    assert names(shards, split="validation") == ["val-000.tar/val-000.png"]
    assert len(load_pictures(f"{shards}/*.tar", "validation")) == 1
    assert len(load_pictures(f"{shards}/val-000.tar")) == 1  # named by the user, and no other is there
    (tmp_path / "more" / "validation").mkdir(parents=True)
    (shards / "val-000.tar").rename(tmp_path / "more" / "validation" / "a.tar")
    with pytest.raises(NoPicturesError, match="its shards are of validation"):
        read(tmp_path / "more")
    assert names(tmp_path / "more", split="validation") == ["validation/a.tar/val-000.png"]
    fill(tmp_path / "more", "0.png")
    table(tmp_path / "more/metadata.jsonl", "0.png")
    assert names(tmp_path / "more") == ["0.png"]


def test_a_table_in_every_folder(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/deep/2.png", "b/3.png", "c/4.png", "c/5.png")
    table(tmp_path / "a/metadata.jsonl", "1.png")
    table(tmp_path / "b/metadata.jsonl", "deep/2.png", "../c/5.png")
    (tmp_path / "c/4.txt").write_text("beside")
    found = read(tmp_path)
    assert {found.key(p.name): p.captions for p in found.pictures} == {
        "a/1.png": ("of 1.png",),
        "b/deep/2.png": ("of deep/2.png",),
        "c/5.png": ("of ../c/5.png",),
        "c/4.png": ("beside",),
    }
    table(tmp_path / "metadata.jsonl", "a/1.png", "b/3.png")
    found = read(tmp_path)
    assert {found.key(p.name): p.captions for p in found.pictures} == {
        "a/1.png": ("of a/1.png", "of 1.png"),
        "b/3.png": ("of b/3.png",),
        "b/deep/2.png": ("of deep/2.png",),
        "c/5.png": ("of ../c/5.png",),
    }
    report = examine_source(DoctorSettings(data=str(tmp_path)))
    assert [f.name for f in report.warnings if "not in metadata.jsonl" in f.reason] == ["c/4.png"]


def test_kinds_of_pictures_that_are_not_read(tmp_path: Path) -> None:
    fill(tmp_path, "fine.png", "pair.jpg")
    for name in ("a.dng", "b.JXL", "c.XCF", "notes.md", "pair.dng"):
        (tmp_path / name).write_bytes(b"what these begin with")
    for name in ("fine", "a", "b", "pair"):
        (tmp_path / f"{name}.txt").write_text("x")
    report = examine_source(DoctorSettings(data=str(tmp_path)))
    assert [entry.name for entry in report.entries] == ["fine.png", "pair.jpg"]
    refused = {finding.name: finding.reason for finding in report.refused}
    assert sorted(refused) == ["a.dng", "b.JXL"]  # with captions: somebody wanted them
    assert ".jxl pictures are read with a further package: install pillow-jxl-plugin" in refused["b.JXL"]
    assert ".xcf pictures are not read" in next(f.reason for f in report.warnings if f.name == "c.XCF")
    assert len(read(tmp_path, condition="none").refused) == 3
    with pytest.raises(ValueError, match="3 of 5 pictures cannot be used"):
        prepare_pictures(AutoencoderSettings(data=str(tmp_path), output=str(tmp_path / "out")), condition="none")


def test_what_is_not_read_is_named_in_tables_too(tmp_path: Path) -> None:
    fill(tmp_path, "fine.png")
    (tmp_path / "a.JXL").write_bytes(b"?")
    table(tmp_path / "metadata.jsonl", "fine.png", "a.JXL")
    found = read(tmp_path)
    assert [found.key(p.name) for p in found.pictures] == ["fine.png"]
    assert "install pillow-jxl-plugin" in found.refused[0].reason


def test_doctor_does_not_say_that_everything_can_be_used(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(doctor)
    fill(tmp_path, *(f"{i}.png" for i in range(3)))
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("x")
    (tmp_path / "work.xcf").write_bytes(b"?")
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert "work.xcf: .xcf pictures are not read; save it as PNG or JPEG" in result.output
    assert "Everything can be used" not in result.output


@pytest.mark.parametrize("kind", ["TGA", "DDS", "PCX", "SGI", "PSD"])
def test_what_pillow_reads_by_name(tmp_path: Path, kind: str) -> None:
    picture = hostile.noise(3)
    if kind == "PSD":
        header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, picture.height, picture.width, 8, 3)
        planes = b"".join(band.tobytes() for band in picture.split())
        content = header + bytes(12) + bytes(2) + planes
    else:
        content = hostile.encode(picture, kind)
    assert decode(content, f"a.{kind}").image.tobytes() == picture.tobytes()
    (tmp_path / f"a.{kind}").write_bytes(content)
    (tmp_path / "a.txt").write_text("x")
    report = examine_source(DoctorSettings(data=str(tmp_path)))
    assert [(entry.name, entry.size, entry.warnings) for entry in report.entries] == [(f"a.{kind}", picture.size, ())]
    if kind == "TGA":  # any bytes may be one, so only the name tells
        with pytest.raises(ValueError, match="not a picture of a known format"):
            decode((tmp_path / "a.TGA").read_bytes(), "a.png")


def test_heic() -> None:
    """Sixteen by sixteen, of one red."""
    if find_spec("pi_heif") is None:
        assert "install pi-heif, or save it as PNG" in str(why_unreadable("a.HEIC"))
        pytest.skip("pi-heif is not installed")
    assert why_unreadable("a.HEIC") is None
    decoded = decode(base64.b85decode(HEIC), "a.HEIC")
    assert (decoded.image.size, decoded.format) == ((16, 16), "HEIF")
    assert np.abs(np.array(decoded.image, dtype=int) - (200, 30, 40)).max() <= 3


def test_backslashes_and_accents(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    fill(tmp_path, "images/1.png", f"one/{composed}", f"two/{decomposed}", "a\\b.png", "images/sub/2.png")
    table(
        tmp_path / "metadata.jsonl",
        *("images\\1.png", f"one/{decomposed}", f"two/{composed}", "a\\b.png", "images\\sub/2.png", "images\\9.png"),
        *("images/1.PNG", "IMAGES\\SUB\\2.PNG", "images/1.png/2.png"),
    )
    found = read(tmp_path)
    assert [found.key(p.name) for p in found.pictures] == [
        *("images/1.png", f"one/{composed}", f"two/{decomposed}", "a\\b.png", "images/sub/2.png")
    ]
    assert "no such file" in found.refused[0].reason
    hints = [finding.reason.partition(" (No such file or directory)")[2] for finding in found.refused[:3]]
    assert hints == [
        "",
        "; there is images/1.png, and upper case counts",
        "; there is images/sub/2.png, and upper case counts",
    ]
    assert not [f for f in examine_source(DoctorSettings(data=str(tmp_path))).warnings if "not in" in f.reason]


def test_caption_files_with_other_accents_and_capitals(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    fill(tmp_path, f"{composed}1.png", f"{decomposed}2.png", "IMG_1.PNG", "b.png")
    for name in (f"{decomposed}1.txt", f"{composed}2.txt", "IMG_1.TXT", "b.TXT", "b.txt"):
        (tmp_path / name).write_text(unicodedata.normalize("NFC", name))
    found = read(tmp_path)
    assert {unicodedata.normalize("NFC", found.key(p.name)): p.captions[0] for p in found.pictures} == {
        f"{composed}1.png": f"{composed}1.txt",
        f"{composed}2.png": f"{composed}2.txt",
        "IMG_1.PNG": "IMG_1.TXT",
        "b.png": "b.txt",
    }


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_marks_between_columns(tmp_path: Path, mark: str) -> None:
    fill(tmp_path, "a.png", "b.png")
    lines = [["file_name", "text"], ["a.png", "one, two"], ["b.png", "three", "four"]]
    (tmp_path / "metadata.csv").write_text("\n".join(mark.join(line) for line in lines), encoding="utf-8-sig")
    found = read(tmp_path)
    assert [p.captions for p in found.pictures] == [("one, two",)]
    assert "3 fields, where the first line names 2; quote " in found.refused[0].reason


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_array_instead_of_lines(tmp_path: Path, encoding: str) -> None:
    fill(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": "é"}, ["b.png"], {"file_name": "b.png", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding=encoding)
    found = read(tmp_path)
    assert [p.captions for p in found.pictures] == [("é",), ("two",)]
    assert [(found.key(f.name), f.reason) for f in found.refused] == [
        ("metadata.jsonl, entry 2", "expected an object, {...}, not a list")
    ]


def test_folders_without_end(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    deep = tmp_path / "/".join(["d"] * 150)
    deep.mkdir(parents=True)
    found = read(tmp_path, caption="x")
    assert len(found.pictures) == 1
    assert "more than 100 folders deep" in found.warnings[0].reason


@pytest.mark.parametrize("name", ["stamp", "below/stamp"])
def test_a_folder_of_nearly_that_name_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    right = Path(name).with_name("stamps")
    right.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such folder; did you mean '{right}'"):
        load_pictures(name)
