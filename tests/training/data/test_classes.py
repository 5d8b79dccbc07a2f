"""Classes of pictures, as users have them: folders, whole numbers, labels of `datasets`, and .cls files."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import hostile
import pytest
from PIL import Image

from latentdiff.training.data import Wanted, load_pictures, read_source
from latentdiff.training.data.caption_checks import class_names


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_folders_as_the_datasets_library_reads_them(tmp_path: Path) -> None:
    data = tmp_path / "cars"
    for i, name in enumerate(("train/audi/1.png", "train/bmw x5/1.png", "train/bmw x5/2.png", "validation/audi/3.png")):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(data / name)
    for split in ("train", "validation"):
        ours = load_pictures(str(data), split, condition="class")
        theirs = datasets.load_dataset("imagefolder", data_dir=str(data), split=split)
        labels = theirs.features["label"]
        assert [p.captions for p in ours] == [(labels.int2str(row["label"]),) for row in theirs]
        assert [p.captions for p in load_pictures(str(data), split, condition="none")] == [("",)] * len(ours)
    assert class_names(load_pictures(str(data), condition="class")) == ["audi", "bmw x5"]
    with pytest.raises(FileNotFoundError, match=r"no caption; write one into 1\.txt"):
        load_pictures(str(data))


def test_a_caption_beside_it_comes_before_the_folder(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(hostile.encode(hostile.noise(0)))
    (tmp_path / "a/2.txt").write_text("other")
    found = read_source(str(tmp_path), Wanted(condition="class"))
    assert [p.captions for p in found.pictures] == [("a",), ("other",)]
    assert "no class; lay it into a folder named like it, write one into 3.txt" in found.refused[0].reason


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_datasets(tmp_path: Path, streaming: bool) -> None:
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    columns: dict[str, Any] = {
        "image": [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "green")],
        "label": [1, 0, -1],
    }
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    dataset.to_parquet(str(tmp_path / "data/train.parquet"))
    wanted = Wanted(condition="class", caption_column="label", streaming=streaming, cache_dir=tmp_path / "copy")
    found = read_source(str(tmp_path / "data"), wanted)
    assert [p.captions for p in found.pictures] == [("dog",), ("cat",)]
    assert "no caption in 'label'" in found.refused[0].reason


def test_whole_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    rows = []
    for i in (10, 9, 2, True):
        Image.new("RGB", (8, 8), (int(i), 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "digit": i})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_source(str(tmp_path), Wanted(condition="class", caption_column="digit"))
    assert class_names(found.pictures) == ["2", "9", "10"]
    assert "must be a caption or a list of captions, not True" in found.refused[0].reason
    as_text = read_source(str(tmp_path), Wanted(caption_column="digit"))
    assert not as_text.pictures  # a number is no caption


def test_cls_files_in_shards(tmp_path: Path) -> None:
    picture = hostile.encode(hostile.noise(0))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name, content in {"a.png": picture, "a.cls": b"3", "a.txt": b"a cat", "b.png": picture}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    found = read_source(str(tmp_path), Wanted(condition="class"))
    assert [p.captions for p in found.pictures] == [("3",)]
    assert "no caption" in found.refused[0].reason
    assert [p.captions for p in read_source(str(tmp_path), Wanted()).pictures] == [("a cat",)]
