"""WebDataset shards."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import hostile
import pytest
from tars import write

from latentdiff.training.data import NoPicturesError, Source, Wanted, load_pictures, read_source


def read(source: Path | str, **wanted: Any) -> Source:
    return read_source(str(source), Wanted(**wanted))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        members: dict[str, bytes] = {}
        for i in range(4):
            members[f"x/{i:03}.png"] = hostile.encode(hostile.noise(10 * number + i))
            members[f"x/{i:03}.mask.png"] = hostile.encode(hostile.noise(99))
            members[f"x/{i:03}.txt"] = f"shard {number}, picture {i}".encode()
        write(folder / f"data-{number:02}.tar", members)
    return folder


def test_folder_file_and_patterns(shards: Path) -> None:
    everything = read(shards)
    assert [p.captions[0] for p in everything.pictures] == [
        f"shard {number}, picture {i}" for number in range(3) for i in range(4)
    ]
    assert everything.key(everything.pictures[5].name) == "data-01.tar/x/001.png"
    for number, i in ((2, 3), (0, 0), (1, 2)):  # in any order
        assert everything.pictures[4 * number + i].read() == hostile.encode(hostile.noise(10 * number + i))
    assert len(read(shards / "data-01.tar").pictures) == 4
    assert len(read(f"{shards}/data-{{00..01}}.tar").pictures) == 8
    assert len(read(f"{shards}/data-{{00,02}}.tar").pictures) == 8
    assert len(read(f"{shards}/*.tar").pictures) == 12
    assert len(read(shards, max_pictures=6).pictures) == 6
    with pytest.raises(FileNotFoundError, match=r"data-03\.tar: no such shard"):
        read(f"{shards}/data-{{02..03}}.tar")
    with pytest.raises(NoPicturesError, match="no pictures of split 'validation'"):
        read(shards, split="validation")
    with pytest.raises(NoPicturesError, match="no pictures of split 'validation'; its shards are of train"):
        read(f"{shards}/*.tar", split="validation")


def test_pictures_survive_pickling(shards: Path) -> None:
    pictures = load_pictures(str(shards))
    assert [p.read() for p in pickle.loads(pickle.dumps(pictures))] == [p.read() for p in pictures]


def test_split_folders_of_shards(shards: Path) -> None:
    (shards / "validation").mkdir()
    (shards / "data-02.tar").rename(shards / "validation" / "data-02.tar")
    assert len(read(shards).pictures) == 8
    held_out = read(shards, split="validation")
    assert held_out.key(held_out.pictures[0].name) == "validation/data-02.tar/x/000.png"


def test_json_captions(tmp_path: Path) -> None:
    picture = hostile.encode(hostile.noise(0))
    fields = {"text": ["one", "two"], "weight": 3, "url": "x"}
    members = {
        "a.png": picture, "a.json": json.dumps(fields).encode(),
        "b.png": picture, "b.json": b'{"caption": "other"}', "b.txt": b"from the text",
        "c.png": picture, "c.json": b'{"caption": "other"}',
        "d.png": picture, "d.json": b"{",
        "e.png": picture,
        "f.txt": b"no picture",
    }  # fmt: skip
    write(tmp_path / "data.tar", members)
    found = read(tmp_path)
    assert [(p.captions, p.weight) for p in found.pictures] == [(("one", "two"), 3.0), (("from the text",), 1.0)]
    reasons = {found.key(f.name): f.reason for f in found.refused}
    assert "no 'text'; it has caption" in reasons["data.tar/c"]
    assert "not JSON" in reasons["data.tar/d"]
    assert "no caption" in reasons["data.tar/e"]
    assert reasons["data.tar/f"] == "no picture, only .txt"
    assert [p.captions for p in read(tmp_path, caption_column="caption").pictures][1:] == [("other",)]
    assert len(read(tmp_path, condition="none").pictures) == 4


def test_damaged_shards_lose_only_what_is_lost(shards: Path) -> None:
    whole = (shards / "data-00.tar").read_bytes()
    last = read(shards / "data-00.tar").pictures[-1]
    (shards / "data-00.tar").write_bytes(whole[: last.read.start + 100])  # type: ignore[attr-defined]
    (shards / "data-01.tar").write_bytes(b"no tar at all" * 100)
    write(shards / "data-03.tar", {"a.png": hostile.encode(hostile.noise(0)), "a.txt": b"a"}, mode="w:gz")
    (shards / "data-04.tar").write_bytes(b"")
    found = read(shards)
    assert len(found.pictures) == 3 + 4
    assert {found.key(f.name).split("/")[0] for f in found.refused} == {
        "data-00.tar", "data-01.tar", "data-03.tar", "data-04.tar"
    }  # fmt: skip


def test_what_is_no_plain_file_is_not_used(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        text = tarfile.TarInfo("a.txt")
        text.size = 1
        archive.addfile(text, io.BytesIO(b"a"))
        up = tarfile.TarInfo("../../b.png")
        up.size = 1
        archive.addfile(up, io.BytesIO(b"b"))
    found = read(tmp_path, caption="a photo")
    assert [found.key(p.name) for p in found.pictures] == ["data.tar/../../b.png"]  # a name, which nobody opens
    assert found.pictures[0].read() == b"b"
    assert [found.key(f.name) for f in found.refused] == ["data.tar/a"]
    assert [found.key(f.name) for f in found.warnings] == ["data.tar/a.png"]


def test_long_names_do_not_fill_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = hostile.encode(hostile.noise(0))
    long = {f"{i:04}{'x' * 5_000}.png": picture for i in range(50)}
    many = {f"one.{i:04}{'y' * 500}": b"" for i in range(2_000)}
    write(tmp_path / "long.tar", {"a.png": picture, "a.txt": b"fine", **long, **many})
    found = read(tmp_path)
    assert [p.captions for p in found.pictures] == [("fine",)]
    reasons = {found.key(finding.name): finding.reason for finding in found.refused}
    assert reasons["long.tar"] == "has 50 entries with names of more than 1,000 characters"
    assert reasons["long.tar/one"].startswith("no picture, only .0000yyy")
    assert len(reasons["long.tar/one"]) < 300
    assert len(load_pictures(str(tmp_path))) == 1
    assert max(len(record.getMessage()) for record in caplog.records) < 1_000
