"""Shards behind an address give what they give on the disk, without a whole copy."""

import functools
import http.server
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import hostile
import pytest
from tars import write

from latentdiff.training.data import CaptionedPicture, NoPicturesError, Wanted, prepare_pictures, read_source, remote
from latentdiff.training.data.picture_table import PictureTable
from latentdiff.training.settings import RunSettings

ASKED: list[tuple[str, str, str]] = []
"""Method, path and range of what the server was asked."""


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, also parts of them."""

    gives_parts, failures = True, 0

    def send_head(self) -> Any:
        asked = self.headers.get("Range", "")
        ASKED.append((self.command, self.path, asked))
        file = Path(self.translate_path(self.path))
        if type(self).failures > 0:
            type(self).failures -= 1
            self.send_error(503)
            return None
        if not asked or not self.gives_parts or not file.is_file():
            return super().send_head()
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Content-Range", f"bytes {first}-{last}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(file.read_bytes()[first : last + 1])
        return None

    def log_message(self, *_: Any) -> None:
        pass


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
    monkeypatch.setattr(Server, "gives_parts", True)
    monkeypatch.setattr(Server, "failures", 0)
    ASKED.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=shards)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


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
    assert [what for what, _, _ in ASKED].count("GET") == 3, "each shard came once"
    ASKED.clear()
    again = prepared(f"{address}/data-{{0..2}}.tar", tmp_path / "run")
    assert plain(again) == plain(local)
    assert {what for what, _, _ in ASKED} == {"HEAD"}, "a later start asks only whether they are the same"

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
    ASKED.clear()
    Server.failures = 2
    assert plain(found[:4]) == plain(local)
    assert not ASKED, "the first shard is here"
    assert [picture.read() for picture in found[4:]] == [
        hostile.encode(hostile.noise(10 * number + i)) for number in (1, 2) for i in (0, 1, 2, 4)
    ]
    assert len(ASKED) == 8 + 2, "a picture is one request, and one that fails is made again"
    assert all(asked.startswith("bytes=") for _, _, asked in ASKED)
    copies[0].unlink()
    assert plain(found[:4]) == plain(local), "nothing depends on a copy"
    monkeypatch.setattr(Server, "gives_parts", False)
    with pytest.raises(ValueError, match=r"data-1.tar gave .* bytes where .* LATENTDIFF_SHARDS_GB"):
        found[5].read()


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


def test_what_cannot_be_reached(shards: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"/data-9\.tar: no such shard"):
        read_source(f"{address}/data-9.tar", wanted)
    with pytest.raises(FileNotFoundError, match=r"no such shard"):
        read_source(f"file://{shards}/none-*.tar", wanted)
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/a.tar: cannot be reached \(.*127\.0\.0\.1"):
        read_source("http://127.0.0.1:9/a.tar", wanted)
    with pytest.raises(ValueError, match=r"nonsense://a/b.tar: .*nonsense"):
        read_source("nonsense://a/b.tar", wanted)
    monkeypatch.setenv("LATENTDIFF_SHARDS_GB", "many")
    with pytest.raises(ValueError, match="LATENTDIFF_SHARDS_GB=many"):
        read_source(f"{address}/data-0.tar", wanted)
