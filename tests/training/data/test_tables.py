"""Datasets of the `datasets` library."""

import contextlib
import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latentdiff.training.data import NoPicturesError, Wanted, from_dataset, load_pictures, read_pixels, read_source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def dataset() -> datasets.Dataset:
    columns = {
        "photo": [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "green", "white")],
        "words": ["a blue square", None, "green", "white"],
        "weight": [2.0, 1.0, -1.0, None],
    }
    kinds = {"photo": datasets.Image(), "words": datasets.Value("string"), "weight": datasets.Value("float32")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


COLUMNS: dict[str, Any] = {"image_column": "photo", "caption_column": "words"}


def test_in_memory(dataset: datasets.Dataset) -> None:
    pictures = from_dataset(dataset, **COLUMNS)
    assert [(p.name, p.captions, p.weight) for p in pictures] == [
        ("dataset[0]", ("a blue square",), 2.0),
        ("dataset[3]", ("white",), 1.0),
    ]
    torch.testing.assert_close(read_pixels(pictures[0], 8, 8)[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    again = pickle.loads(pickle.dumps(pictures))
    assert [p.read() for p in again] == [p.read() for p in pictures]
    assert len(from_dataset(dataset.with_format("torch"), **COLUMNS)) == 2
    with pytest.raises(ValueError, match="no column 'image'; it has photo, words"):
        from_dataset(dataset)


def test_saved_to_disk(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=dataset, validation=dataset.select([0])).save_to_disk(str(tmp_path / "both"))
    for folder in ("one", "both"):
        (picture, _) = load_pictures(str(tmp_path / folder), **COLUMNS)
        assert picture.captions == ("a blue square",)
        assert pickle.loads(pickle.dumps(picture)).read() == picture.read()
    assert len(load_pictures(str(tmp_path / "both"), "validation", **COLUMNS)) == 1
    with pytest.raises(NoPicturesError, match="no split 'test'; it has train, validation"):
        load_pictures(str(tmp_path / "both"), "test", **COLUMNS)
    with pytest.raises(NoPicturesError, match="no split 'validation'; it has train"):
        load_pictures(str(tmp_path / "one"), "validation", **COLUMNS)


def test_bytes_and_paths_in_columns(tmp_path: Path) -> None:
    content = hostile.encode(hostile.noise(0))
    (tmp_path / "a.png").write_bytes(content)
    paths = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png"), "gone.png"], "text": [["a", "b"], ["c"]]})
    pictures = from_dataset(paths)
    assert pictures[0].read() == content
    assert pictures[0].captions == ("a", "b")
    with pytest.raises(ValueError, match=r"dataset\[1\]: cannot be read"):
        read_pixels(pictures[1], 8, 8)
    encoded = datasets.Dataset.from_dict({"image": [content, None], "text": ["a", "b"]})
    pictures = from_dataset(encoded)
    assert pictures[0].read() == content
    with pytest.raises(ValueError, match="there is no picture in this row"):
        read_pixels(pictures[1], 8, 8)


def test_a_stream_is_read_once(dataset: datasets.Dataset, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    dataset.to_parquet(str(tmp_path / "data" / "train-0.parquet"))
    assert len(load_pictures(str(tmp_path / "data"), **COLUMNS)) == 2  # a folder that load_dataset understands
    wanted = Wanted(streaming=True, cache_dir=tmp_path / "copy", **COLUMNS)
    found = [read_source(str(tmp_path / "data"), wanted) for _ in range(2)]
    for source in found:
        assert [(p.captions, p.weight) for p in source.pictures] == [(("a blue square",), 2.0), (("white",), 1.0)]
        assert [source.key(f.name) for f in source.refused] == ["(train)[1]", "(train)[2]"]
        torch.testing.assert_close(read_pixels(source.pictures[0], 8, 8)[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    assert len(list((tmp_path / "copy").rglob("*.arrow"))) == 1
    first = Wanted(streaming=True, cache_dir=tmp_path / "copy", max_pictures=1, **COLUMNS)
    assert len(read_source(str(tmp_path / "data"), first).pictures) == 1
    dataset.select([3]).to_parquet(str(tmp_path / "data" / "train-0.parquet"))  # other files, another copy
    assert [p.captions for p in read_source(str(tmp_path / "data"), wanted).pictures] == [("white",)]


def rows(fail: bool) -> Iterator[dict[str, Any]]:
    yield {"image": {"bytes": hostile.encode(hostile.noise(0)), "path": None}, "text": ["one", "two"]}
    if fail:
        raise ConnectionError("the line was cut")


def test_an_iterable_dataset_is_copied_whole_or_not_at_all() -> None:
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    stream = datasets.IterableDataset.from_generator(rows, features=kinds, gen_kwargs={"fail": False})
    (picture,) = from_dataset(stream)
    assert picture.captions == ("one", "two")
    assert picture.read() == hostile.encode(hostile.noise(0))
    stream = datasets.IterableDataset.from_generator(rows, features=kinds, gen_kwargs={"fail": True})
    with pytest.raises(ValueError, match="could not be read to its end"):
        from_dataset(stream)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A picture beside the dataset's folder, that nobody named."""
    file = tmp_path / "home" / "private.png"
    file.parent.mkdir()
    file.write_bytes(hostile.encode(hostile.noise(7)))
    return file


def parquet_of(folder: Path, *images: dict[str, Any]) -> Path:
    """A cloned dataset whose rows have these pictures."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": list(images), "text": [f"row {i}" for i in range(len(images))]}
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / "data" / "x.parquet")
    return folder


class Server(BaseHTTPRequestHandler):
    """Counts who asks."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(hostile.encode(hostile.noise(0)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_rows_do_not_lead_elsewhere(tmp_path: Path, private: Path, streaming: bool) -> None:
    Server.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = hostile.encode(hostile.noise(1))
    elsewhere = ["/dev/zero", str(private), "../home/private.png", f"http://127.0.0.1:{server.server_port}/a.png"]
    elsewhere += ["link", f"file://{private}", "zip://a.png::/dev/zero"]
    rows = [{"bytes": None, "path": path} for path in ["own", *elsewhere]]
    folder = parquet_of(tmp_path / "clone", {"bytes": own, "path": None}, *rows)
    (folder / "own").write_bytes(own)
    (folder / "link").symlink_to(private)
    wanted = Wanted(streaming=streaming, cache_dir=tmp_path / "copy")
    found = read_source(str(folder), wanted)
    refused = [finding.reason for finding in found.refused]
    read = []
    for picture in found.pictures:
        try:
            read.append(picture.read())
        except (OSError, ValueError) as error:
            refused.append(str(error))
    assert read == [own, own]
    assert len(refused) == len(elsewhere)
    assert sum("leaves the folder" in reason for reason in refused) == 4
    assert sum("read from the disk only" in reason for reason in refused) == 3
    assert not Server.asked
    server.shutdown()
    allowed = Wanted(streaming=streaming, cache_dir=tmp_path / "copy", picture_folder=str(private.parent))
    found = read_source(str(folder), allowed)
    good = []
    for picture in found.pictures:
        with contextlib.suppress(OSError, ValueError):
            good.append(picture.read())
    assert good == [own, own, private.read_bytes(), private.read_bytes(), private.read_bytes()]


def test_tables_and_links_lead_to_what_the_user_allows(tmp_path: Path, private: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(private)
    (folder / "more").symlink_to(private.parent)
    names = [str(private), "../home/private.png", "link.png", "more/private.png"]
    rows = [json.dumps({"file_name": name, "text": name}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    found = read_source(str(folder), Wanted())
    assert not found.pictures
    assert all("picture_folder=FOLDER allows" in finding.reason for finding in found.refused)
    found = read_source(str(folder), Wanted(picture_folder=str(private.parent)))
    assert [finding.reason for finding in found.refused] == []
    assert {picture.read() for picture in found.pictures} == {private.read_bytes()}
    (folder / "metadata.jsonl").unlink()
    found = read_source(str(folder), Wanted(caption="x"))
    assert [finding.name for finding in found.refused] == [str(folder / "link.png")]
    assert [finding.name for finding in found.warnings] == [str(folder / "more")]
    found = read_source(str(folder), Wanted(caption="x", picture_folder=str(private.parent)))
    assert [found.key(picture.name) for picture in found.pictures] == ["link.png", "more/private.png"]
    (private.parent / "again").symlink_to(folder)  # round and round
    found = read_source(str(folder), Wanted(caption="x", picture_folder=str(tmp_path)))
    assert len(found.pictures) == 2


def test_a_stream_of_ones_own_does_not_ask_the_network() -> None:
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(remote_rows, features=kinds)
    with pytest.raises(FileNotFoundError, match="read from the disk only; download them first"):
        from_dataset(stream)


def remote_rows() -> Iterator[dict[str, Any]]:
    yield {"image": {"bytes": None, "path": "http://127.0.0.1:9/a.png"}, "text": "one"}


@pytest.mark.parametrize("where", ["../home/*.parquet", "{home}/x.parquet", "http://127.0.0.1:9/x.parquet"])
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("streaming", [False, True])
def test_settings_of_a_dataset_do_not_lead_elsewhere(tmp_path: Path, where: str, name: str, streaming: bool) -> None:
    picture = {"bytes": hostile.encode(hostile.noise(1)), "path": None}
    folder = parquet_of(tmp_path / "clone", picture)
    home = parquet_of(tmp_path / "home", picture)
    (home / "data" / "x.parquet").rename(home / "x.parquet")
    text = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{where.format(home=home)}'\n"
    (folder / name).write_text(f"\n---\na: b\n---c: d\n{text}---\n# mine\n" if name == "README.md" else text)
    with pytest.raises(ValueError, match="lies outside the dataset's folder"):
        read_source(str(folder), Wanted(streaming=streaming, cache_dir=tmp_path / "copy"))
    (folder / name).write_text("---\nlicense: mit\n---\n# mine\n" if name == "README.md" else "license: mit\n")
    assert len(read_source(str(folder), Wanted(streaming=streaming, cache_dir=tmp_path / "copy")).pictures) == 1
    (folder / "data" / "y.parquet").symlink_to(home / "x.parquet")
    with pytest.raises(ValueError, match=r"y\.parquet is a link out of the dataset's folder"):
        read_source(str(folder), Wanted(streaming=streaming, cache_dir=tmp_path / "copy"))


def test_a_saved_dataset_does_not_lead_elsewhere(dataset: datasets.Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(str(tmp_path / "one"))
    dataset.save_to_disk(str(tmp_path / "two"))
    state = tmp_path / "one" / "state.json"
    state.write_text(state.read_text().replace('"data-00000', '"../two/data-00000'))
    with pytest.raises(ValueError, match=r"state\.json: \.\./two/data-00000.* lies outside the dataset's folder"):
        load_pictures(str(tmp_path / "one"), **COLUMNS)


def test_a_dataset_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "1234"
    blobs = tmp_path / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "cafe").write_bytes(hostile.encode(hostile.noise(1)))
    (blobs / "beef").write_text('{"file_name": "a.png", "text": "x"}')
    (snapshot / "a.png").symlink_to("../../blobs/cafe")
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/beef")
    (picture,) = load_pictures(str(snapshot))
    assert picture.read() == (blobs / "cafe").read_bytes()
