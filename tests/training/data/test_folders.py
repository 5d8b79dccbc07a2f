"""Folders with a table, with captions beside the pictures, and with splits."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentdiff.training.data import NoPicturesError, Source, Wanted, load_pictures, read_source


def fill(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(hostile.encode(hostile.noise(i)))


def read(folder: Path, **wanted: Any) -> Source:
    return read_source(str(folder), Wanted(**wanted))


def test_jsonl(pictures: Path) -> None:
    train = load_pictures(str(pictures))
    assert len(train) == 10
    assert train[0].captions == ("a red thing", "red")
    assert train[0].name == str(pictures / "0.png")
    assert len(load_pictures(str(pictures), "validation")) == 2
    assert [p.name for p in load_pictures(str(pictures), max_pictures=3)] == [p.name for p in train[:3]]
    with pytest.raises(NoPicturesError, match="no rows of split 'test'; its splits: train, validation"):
        load_pictures(str(pictures), "test")


def test_csv_and_parquet_say_the_same(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "sub/b.png", "c.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text,weight,split\na.png,"one, two",2.5,\nsub/b.png,"said ""so""\nover lines",,train\n'
        "c.png,held out,1,validation\n",
        encoding="utf-8-sig",
    )
    from_csv = read(tmp_path)
    assert [(p.captions, p.weight) for p in from_csv.pictures] == [
        (("one, two",), 2.5),
        (('said "so"\nover lines',), 1),
    ]
    assert len(read(tmp_path, split="validation").pictures) == 1
    (tmp_path / "metadata.csv").unlink()
    columns = {
        "file_name": ["a.png", "sub/b.png", "c.png", None],
        "text": ["one, two", 'said "so"\nover lines', "held out", "?"],
        "weight": [2.5, None, 1.0, 1.0],
        "split": [None, "train", "validation", "train"],
        "other": [b"\xff", b"", b"", b""],
    }
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    from_parquet = read(tmp_path)
    assert from_parquet.pictures == from_csv.pictures
    assert from_parquet.refused[0].name.endswith("metadata.parquet, row 4")
    lists = pa.table({"file_name": ["a.png"], "text": [["one", "two"]]})
    pq.write_table(lists, tmp_path / "metadata.parquet")
    assert read(tmp_path).pictures[0].captions == ("one", "two")


def test_broken_utf8_in_parquet_is_one_row(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    text = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"file_name": pa.array(["a.png", "b.png"]), "text": text}), tmp_path / "metadata.parquet")
    found = read(tmp_path)
    assert [p.captions for p in found.pictures] == [("fine",)]
    assert [(f.name.rpartition(", ")[2], f.reason) for f in found.refused] == [("row 2", "text that is not UTF-8")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"text": "a"}', "line 2: no file_name"),
        ('{"file_name": "0.png"}', r"line 2 \(0.png\): no caption in 'text'"),
        ('{"file_name": "0.png", "text": ""}', "no caption in 'text'"),
        ('{"file_name": "0.png", "text": 3}', "must be a caption"),
        ('{"file_name": "0.png", "text": "a", "weight": -1}', "weight must be"),
        ('{"file_name": "../x.png", "text": "a"}', "leaves the folder"),
        ('{"file_name": "gone.png", "text": "a"}', r"no such file: .*gone\.png"),
    ],
)
def test_a_bad_row_is_left_out_and_named(
    pictures: Path, line: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = '{"file_name": "1.png", "text": "fine"}'
    (pictures / "metadata.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    assert [p.captions for p in load_pictures(str(pictures))] == [("fine",)]
    assert any(re.search(message, record.getMessage()) for record in caplog.records)
    (pictures / "metadata.jsonl").write_text(f'{{"split": "validation"}}\n{line}\n', encoding="utf-8")
    with pytest.raises((NoPicturesError, ValueError)):
        load_pictures(str(pictures))


def test_faults_of_the_whole_are_errors(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_pictures(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no-such-folder: no such folder here, and no dataset of that name"):
        load_pictures("no-such-folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no captioned pictures"):
        load_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl: no column 'words'; it has file_name, text, split"):
        load_pictures(str(pictures), caption_column="words")
    (pictures / "metadata.jsonl").rename(tmp_path / "away")
    (pictures / "metadata.csv").write_text("picture,text\n0.png,a\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.csv: no column 'file_name'; it has picture, text"):
        load_pictures(str(pictures))
    (pictures / "metadata.csv").unlink()
    (pictures / "metadata.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"metadata\.parquet: cannot be read as Parquet"):
        load_pictures(str(pictures))


def test_jsonl_in_utf16(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    row = json.dumps({"file_name": "a.png", "text": "ein Bäumchen"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"{row}\n", encoding="utf-16")
    assert read(tmp_path).pictures[0].captions == ("ein Bäumchen",)


def test_a_picture_listed_twice_has_both_captions(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    rows = [
        {"file_name": name, "text": text} for name, text in (("a.png", "one"), ("./a.png", "two"), ("a.png", "one"))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read(tmp_path)
    assert [p.captions for p in found.pictures] == [("one", "two")]
    assert "more than once" in found.warnings[0].reason


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    fill(tmp_path, "b.png", "a.JPG", "sub/c.webp", "d.png", ".hidden.png", "notes.md")
    (tmp_path / "b.txt").write_text("a red square\n", encoding="utf-8")
    (tmp_path / "a.caption").write_text("first", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("deep", encoding="utf-8")
    found = read(tmp_path)
    assert [p.captions for p in found.pictures] == [("first",), ("a red square",), ("deep",)]
    assert [found.key(f.name) for f in found.refused] == ["d.png"]
    assert "write one into d.txt beside it" in found.refused[0].reason
    everything = read(tmp_path, caption="a photo")
    assert [p.captions for p in everything.pictures] == [("first",), ("a red square",), ("a photo",), ("deep",)]
    assert [p.captions for p in read(tmp_path, condition="none").pictures] == [("",)] * 4
    with pytest.raises(NoPicturesError, match="no pictures of split 'validation'"):
        read(tmp_path, split="validation")


def test_split_folders(tmp_path: Path) -> None:
    fill(tmp_path, "train/a.png", "train/b.png", "validation/a.png")
    for name in ("train", "validation"):
        found = read(tmp_path, split=name, caption="a photo")
        assert [found.key(p.name) for p in found.pictures] == {
            "train": ["train/a.png", "train/b.png"],
            "validation": ["validation/a.png"],
        }[name]
    fill(tmp_path, "cars/a.png")  # now they are kinds of things
    assert len(read(tmp_path, caption="a photo").pictures) == 3


def test_held_out_pictures_below_the_training_pictures(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "validation/b.png")
    found = {split: read(tmp_path, split=split, caption="a photo") for split in ("train", "validation")}
    assert [p.name for p in found["train"].pictures] == [str(tmp_path / "a.png")]
    assert [p.name for p in found["validation"].pictures] == [str(tmp_path / "validation" / "b.png")]


def test_the_output_of_a_training_is_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, "train/a.png", "test/b.png", "cup/samples.png", "cup/training/curves.png")
    (tmp_path / "cup" / "training" / "settings.yaml").touch()
    found = read(tmp_path, caption="a photo")
    assert [p.name for p in found.pictures] == [str(tmp_path / "train" / "a.png")]
    fill(tmp_path, "c.png")
    found = read(tmp_path, caption="a photo")
    assert not any("cup" in p.name for p in found.pictures)
    assert [finding.reason for finding in found.warnings] == ["is the output of a training, and is not looked into"]


def test_messages_are_few_and_printable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, *[f"{i}\x1b[31m.png" for i in range(30)], "fine.png")
    (tmp_path / "fine.txt").write_text("fine", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert len(load_pictures(str(tmp_path))) == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 21
    assert messages[-1] == "left out: 10 more"
    assert all(message.isprintable() for message in messages)
