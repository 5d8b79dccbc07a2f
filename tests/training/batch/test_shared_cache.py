"""What a user's runs share stays within its limit, and nothing goes that a run uses."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import typer
from lives import forks, start, wait
from typer.testing import CliRunner

from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.locks import lock
from latentdiff.interchange.shared_cache import Shard, delete, exclusive, shards, size_limit, trim
from latentdiff.pipelines.runtime.places import cache_folder, held
from latentdiff.training.batch.cache import TensorStore, digest
from latentdiff.training.commands.cache import cache

FIRST, SECOND = digest("a model"), digest("another model")
SIZE = 4 * 250_000  # of a tensor, in bytes

program = typer.Typer()
program.command()(cache)


def told(*arguments: str, answer: str = "", status: int = 0) -> str:
    done = CliRunner().invoke(program, arguments, input=answer)
    assert done.exit_code == status, done.output
    return done.output


def filled(
    encoder: str, *keys: str, kind: str = "latents", data: str = "/data/cats", model: str = "emoji"
) -> TensorStore:
    """A store of the shared folder, with a file for each key."""
    store = TensorStore(shared_folder() / kind / encoder, {"data": data, "model": model})
    for key in keys:
        store.write({digest(key): torch.zeros(SIZE // 4)})
    return store


def used(ago: float, *files: Path) -> None:
    for file in files:
        os.utime(file, (time.time() - ago,) * 2)


def files() -> list[Path]:
    return [shard.path for shard in shards(shared_folder())]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shared_folder() == Path(os.environ["LATENTDIFF_CACHE"])
    monkeypatch.delenv("LATENTDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shared_folder() == tmp_path / "latentdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    assert shared_folder() == Path.home() / ".cache" / "latentdiff"
    monkeypatch.setattr("sys.platform", "darwin")
    assert shared_folder() == Path.home() / "Library" / "Caches" / "latentdiff"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr("sys.platform", "win32")
    assert shared_folder() == tmp_path / "local" / "latentdiff"


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert size_limit() == 20_000_000_000
    monkeypatch.setenv("LATENTDIFF_CACHE_GB", "0.5")
    assert size_limit() == 500_000_000
    for wrong in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv("LATENTDIFF_CACHE_GB", wrong)
        with pytest.raises(ValueError, match=f"LATENTDIFF_CACHE_GB={wrong}: a number of gigabytes is expected"):
            size_limit()


def graphs(number: int, size: int = 1000) -> Path:
    """A folder as graphs are kept in."""
    folder = cache_folder() / f"openvino-float32-{number:032x}"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "openvino_model.bin").write_bytes(b"x" * size)
    (folder / "runtime.json").write_text('{"model": "emoji", "precision": "float32", "runtime": "openvino"}')
    return folder


def test_graphs_are_counted_shown_and_cleared_unless_a_pipeline_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    filled(FIRST, "a", data="/data/cats", model="birds")
    one, two = graphs(1, SIZE), graphs(2, SIZE)
    (cache_folder() / "mine").mkdir()
    assert {one, two} < set(files())
    said = told()
    assert "3 MB, and at most 20 GB" in said
    assert "graphs for openvino in float32, of emoji" in said
    claim = held(one)
    assert claim is not None
    said = told("emoji", "--clear", "--yes")
    assert "1 MB stay, for running trainings use them, or pipelines with a runtime." in said
    assert one.is_dir()
    assert not two.exists()
    del claim
    monkeypatch.setenv("LATENTDIFF_CACHE_GB", "0.0015")
    used(100, one)
    trim(shared_folder())
    assert not one.exists()
    assert (cache_folder() / "mine").is_dir()
    assert len(files()) == 1


def test_what_was_used_longest_ago_goes_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled(FIRST, "a", "b")
    filled(SECOND, "c", kind="text")
    first, second, third = files()
    used(100, first)
    used(300, second)
    used(200, third)
    foreign = shared_folder() / "latents" / FIRST / "mine.safetensors"
    foreign.write_bytes(b"x" * SIZE)
    monkeypatch.setenv("LATENTDIFF_CACHE_GB", "0.0025")
    with caplog.at_level(logging.INFO, logger="latentdiff"):
        trim(shared_folder())
    assert files() == [third, first]
    assert "0.001 GB were deleted that were used longest ago" in caplog.text
    assert foreign.exists(), "it is not of the cache"


def test_writing_keeps_to_the_limit_and_using_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    filled(FIRST, "old", "wanted")
    for file in files():
        used(100, file)
    again = filled(FIRST)
    again.claim([digest("wanted")])
    monkeypatch.setenv("LATENTDIFF_CACHE_GB", "0.0025")
    again.write({digest("new"): torch.zeros(SIZE // 4)})
    fresh = TensorStore(again.folder)
    assert (digest("old") in fresh, digest("wanted") in fresh, digest("new") in fresh) == (False, True, True)
    assert len(again[digest("wanted")]) == SIZE // 4


@forks
def test_what_another_process_uses_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled(FIRST, "held", "free")

    def hold() -> None:
        store = TensorStore(shared_folder() / "latents" / FIRST)
        store.claim([digest("held")])
        (tmp_path / "ready").touch()
        signal.pause()

    (child,) = start(hold, tmp_path / "log")
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        used(300, *files())
        monkeypatch.setenv("LATENTDIFF_CACHE_GB", "0")
        trim(shared_folder())
        assert "holds 0.001 GB and may hold 0; running trainings use them" in caplog.text
        assert [digest("held") in TensorStore(files()[0].parent), len(files())] == [True, 1]
        assert "1 MB stay, for running trainings use them" in told("--clear", "--yes")
    finally:
        os.kill(child, signal.SIGKILL)
        wait([child])
    assert list(shared_folder().glob("*/*/.held-*"))
    assert told("--clear", "--yes").endswith("1 MB deleted.\n")
    assert not files()
    assert not list(shared_folder().glob("*/*/.held-*")), "what the killed process left"


def test_what_cannot_be_locked_stays() -> None:
    """Whether somebody holds it is then not known."""
    store = filled(FIRST, "a")
    folder = store.folder
    del store
    with exclusive(folder):
        assert delete(shards(shared_folder())) == (0, shards(shared_folder()))
        with pytest.raises(OSError, match=r"\.lock is locked by another process"), exclusive(folder, patience=0.05):
            raise AssertionError
    with (folder / ".lock").open("ab") as file:
        lock(file)  # it was let go
    assert delete(shards(shared_folder()))[0] > SIZE


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = filled(FIRST, "a").folder
    own = tmp_path / f"{'0' * 32}.safetensors"
    own.write_bytes(b"x")
    (folder / own.name).symlink_to(own)
    assert len(files()) == 1


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    root = shared_folder()
    assert told() == f"{root}: nothing is in the cache.\n"
    assert not root.exists()
    filled(FIRST, "a", "b")
    filled(FIRST, "c", kind="text")
    filled(SECOND, "d", data="owner/dogs", model="/runs/own")
    TensorStore(root / "text" / SECOND).write({digest("e"): torch.zeros(2)})
    today = time.strftime("%Y-%m-%d")
    assert told().splitlines() == [
        f"{root}: 4 MB, and at most 20 GB",
        f"     128 B  used {today}  captions of (not known), by (not known)",
        f"      1 MB  used {today}  captions of /data/cats, by emoji",
        f"      2 MB  used {today}  pictures of /data/cats, by emoji",
        f"      1 MB  used {today}  pictures of owner/dogs, by /runs/own",
    ]
    assert "nothing in the cache was made of it; there is something of /data/cats, /runs/own" in str(
        CliRunner().invoke(program, ["horses"]).exception
    )
    assert len(told("cats").splitlines()) == 3
    assert "Delete 3 MB? [y/N]" in told("cats", "--clear", answer="n\n", status=1)
    assert len(files()) == 5
    assert "3 MB deleted." in told("cats", "--clear", answer="y\n")
    assert len(files()) == 2
    assert "1 MB deleted." in told("own", "--clear", "--yes")
    assert [Shard(path, 0, 0).labels() for path in files()] == [{}]
