"""Shards behind an address give what they give on the disk, without a whole copy."""

import gzip
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import hostile
import pytest
from shard_server import Server, serving
from tars import write

from latentdiff.training.data import (
    CaptionedPicture,
    NoPicturesError,
    Wanted,
    load_pictures,
    prepare_pictures,
    read_pixels,
    read_source,
    remote,
)
from latentdiff.training.data.picture_table import PictureTable
from latentdiff.training.settings import RunSettings


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "there"
    folder.mkdir()
    for number in range(4):
        members = {}
        for i in range(5):
            members[f"{i}.png"] = hostile.encode(hostile.noise(10 * number + i)) if i != 3 else b"broken"
            members[f"{i}.txt"] = f"shard {number}, picture {i}".encode()
        write(folder / f"{'val' if number == 3 else 'data'}-{number}.tar", members)
    return folder


@pytest.fixture
def address(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    pytest.importorskip("requests")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with serving(shards) as address:
        yield address


def prepared(data: str, output: Path) -> Sequence[CaptionedPicture]:
    return prepare_pictures(RunSettings(data=data, output=str(output), max_bad_share=0.5))


def plain(pictures: Sequence[CaptionedPicture]) -> list[Any]:
    return [(p.name.rpartition(".tar/")[2], p.captions, p.digest, p.size, p.read()) for p in pictures]


def test_over_http(shards: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = prepared(f"{shards}/data-{{0..2}}.tar", tmp_path / "local")
    first = prepared(f"{address}/data-{{0..2}}.tar", tmp_path / "run")
    assert isinstance(first, PictureTable)
    assert first[0].name == f"{address}/data-0.tar/0.png"
    assert plain(first) == plain(local)
    assert len(local) == 12
    assert [what for what, _, _ in Server.asked].count("GET") == 3, "each shard came once"
    Server.asked.clear()
    again = prepared(f"{address}/data-{{0..2}}.tar", tmp_path / "run")
    assert plain(again) == plain(local)
    assert {what for what, _, _ in Server.asked} == {"HEAD"}, "a later start asks only whether they are the same"

    write(shards / "data-1.tar", {"7.png": hostile.encode(hostile.noise(77)), "7.txt": b"new"})
    changed = prepared(f"{address}/data-{{0..2}}.tar", tmp_path / "run")
    assert [p.captions[0] for p in changed if p.captions[0] == "new"] == ["new"]
    assert len(changed) == 9


def test_copies_are_bounded(shards: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (shards / "data-0.tar").stat().st_size
    monkeypatch.setenv("LATENTDIFF_SHARDS_GB", str(1.5 * size / 1e9))
    local = prepared(str(shards / "data-0.tar"), tmp_path / "local")
    found = prepared(f"{address}/data-{{0..2}}.tar", tmp_path / "run")
    copies = list((tmp_path / "run/training/stream/shards").iterdir())
    assert [copy.stat().st_size for copy in copies] == [size]
    Server.asked.clear()
    Server.failures = 2
    assert plain(found[:4]) == plain(local)
    assert not Server.asked, "the first shard is here"
    assert [picture.read() for picture in found[4:]] == [
        hostile.encode(hostile.noise(10 * number + i)) for number in (1, 2) for i in (0, 1, 2, 4)
    ]
    assert len(Server.asked) == 8 + 2, "a picture is one request, and one that fails is made again"
    assert all(asked.startswith("bytes=") for _, _, asked in Server.asked)
    copies[0].unlink()
    assert plain(found[:4]) == plain(local), "nothing depends on a copy"
    killed, other = (copies[0].with_name(f".partial-{name}.tar") for name in ("killed", "other"))
    for file in (killed, other):
        file.write_bytes(bytes(size))
    os.utime(killed, (time.time() - 2 * remote.LEFT,) * 2)
    shard = remote.find_remote(f"{address}/data-0.tar")[0]
    with remote.Room(copies[0].parent, {copies[0]}).copy_of(shard):
        pass
    assert list(copies[0].parent.iterdir()) == [other], "a copy that another process is making stays"
    monkeypatch.setattr(Server, "gives_parts", False)
    with pytest.raises(ValueError, match=r"data-1.tar gave .* bytes where .* LATENTDIFF_SHARDS_GB"):
        found[5].read()


def test_a_picture_that_has_changed_is_not_taken_for_another(
    shards: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LATENTDIFF_SHARDS_GB", "0")
    picture = prepared(f"{address}/data-{{0..2}}.tar", tmp_path / "run")[0]
    assert read_pixels(picture, 16, 16).shape == (3, 16, 16)
    (tmp_path / "run/training/checkpoints/step-1").mkdir(parents=True)
    members = {f"{i}.png": hostile.encode(hostile.noise(90 + i)) for i in range(4)}
    write(shards / "data-0.tar", {**members, **{f"{i}.txt": b"new" for i in range(4)}})
    os.utime(shards / "data-0.tar", (time.time() + 10,) * 2)  # a server tells whole seconds
    with pytest.raises(ValueError, match=r"data-0.tar/0.png: has changed since the pictures were examined"):
        read_pixels(picture, 16, 16)
    assert "not those" not in caplog.text
    prepared(f"{address}/data-{{0..2}}.tar", tmp_path / "run")
    assert "the pictures are not those that this run had so far" in caplog.text
    Server.failures = 10**9
    with pytest.raises(ValueError, match=r"data-0.tar/0.png: cannot be read \(http.*503") as caught:
        read_pixels(picture, 16, 16)
    assert "remove" not in str(caught.value), "the picture is not to blame"


def test_other_addresses(shards: Path, tmp_path: Path) -> None:
    local = plain(prepared(f"{shards}/data-*.tar", tmp_path / "local"))
    files = fsspec.filesystem("memory")
    try:
        for shard in shards.iterdir():
            files.pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
        assert plain(prepared("memory://bucket/*.tar", tmp_path / "run")) == local
        held_out = read_source("memory://bucket/*.tar", Wanted(split="validation", cache_dir=tmp_path))
        assert {picture.captions[0][:7] for picture in held_out.pictures} == {"shard 3"}
        assert len(read_source("memory://bucket/*.tar", Wanted(max_pictures=7, cache_dir=tmp_path)).pictures) == 7
    finally:
        files.store.clear()
    assert plain(prepared(f"file://{shards}/data-*.tar", tmp_path / "file")) == local
    with pytest.raises(NoPicturesError, match="no pictures of split 'test'; its shards are of train, validation"):
        read_source(f"file://{shards}/*.tar", Wanted(split="test", cache_dir=tmp_path))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            b"<!DOCTYPE html>\n<html><head><title>Log \xc3\xa4n</title>" + b" " * 5000,
            r"is a web page, no tar file \(Log än\)",
        ),
        (b"<html><h1>\xe4</h1>", "is a web page, no tar file"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML, no tar file .*AccessDenied"),
        (b'{"error": "no such file"}', r'is JSON, no tar file \({"error": "no such file"}\); the address of the file'),
        (b"404: Not Found", r"is text, no tar file \(404: Not Found\)"),
        (b"", "is empty"),
        (gzip.compress(bytes(2000)), "is gzip-compressed; compressed shards must be unpacked first"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "is a pointer of Git LFS"),
        (b"PAR1" + bytes(2000), "is a Parquet file, no tar file"),
        (b"PK\x03\x04" + bytes(2000), "is a zip file"),
        (b"\xff\x00\x01" * 700, r"cannot be read as a tar file \(bad checksum\)"),
    ],
)
def test_answers_that_are_no_shards_are_told_as_what_they_are(
    content: bytes, why: str, shards: Path, address: str, tmp_path: Path
) -> None:
    (shards / "no.tar").write_bytes(content)
    for place in (f"{address}/no.tar", str(shards / "no.tar")):
        with pytest.raises(
            NoPicturesError, match=f"^{place}: not one usable picture; the first fault: .*/no.tar: {why}"
        ):
            load_pictures(place, cache_dir=tmp_path)
        with pytest.raises(ValueError, match=f"1 of 1 pictures cannot be used.*\n  .*/no.tar: {why}"):
            prepared(place, tmp_path / "run")
    found = read_source(f"{address}/{{no,data-0}}.tar", Wanted(cache_dir=tmp_path))
    assert (found.count, [re.search(why, one.reason) is not None for one in found.refused]) == (5, [True])


def test_a_page_without_a_size_is_told_as_a_page(
    shards: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shards / "no.tar").write_bytes(b"<html>")
    monkeypatch.setattr(Server, "kind_without_size", "text/html; charset=utf-8")
    with pytest.raises(
        OSError, match=r"/no\.tar: the server answers with a web page \(text/html\), not with a tar file"
    ):
        read_source(f"{address}/no.tar", Wanted(cache_dir=tmp_path))
    monkeypatch.setattr(Server, "kind_without_size", "application/x-tar")
    with pytest.raises(OSError, match=r"/no\.tar: its size is not said; download it first"):
        read_source(f"{address}/no.tar", Wanted(cache_dir=tmp_path))


def test_what_cannot_be_reached(shards: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"/data-9\.tar: no such shard"):
        read_source(f"{address}/data-9.tar", wanted)
    with pytest.raises(FileNotFoundError, match=r"no such shard"):
        read_source(f"file://{shards}/none-*.tar", wanted)
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/a.tar: cannot be reached \(.*127\.0\.0\.1"):
        read_source("http://127.0.0.1:9/a.tar", wanted)
    with pytest.raises(
        FileNotFoundError, match=r"train\.parquet: behind an address shards are read, and their names end"
    ):
        read_source(f"{address}/train.parquet", wanted)
    with pytest.raises(ValueError, match=r"nonsense://a/b.tar: .*nonsense"):
        read_source("nonsense://a/b.tar", wanted)
    monkeypatch.setenv("LATENTDIFF_SHARDS_GB", "many")
    with pytest.raises(ValueError, match="LATENTDIFF_SHARDS_GB=many"):
        read_source(f"{address}/data-0.tar", wanted)
