"""Whatever happens to its folder, a store gives back what was put in, or says that it is missing."""

import os
import pickle
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from lives import forks, kill, live, start, wait
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from latentdiff.training.batch import cache as cache_module
from latentdiff.training.batch.cache import ABANDONED, TensorStore, digest

KEYS = [digest(i) for i in range(400)]


def made(key: str) -> Tensor:
    """The tensor that belongs to a key."""
    generator = torch.Generator().manual_seed(int(key[:8], 16))
    return torch.randn(2, 4, 3, generator=generator).half()


def put(store: TensorStore, keys: list[str]) -> None:
    store.write({key: made(key) for key in keys})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.safetensors"))


def sound(store: TensorStore, keys: list[str]) -> bool:
    return all(torch.equal(store[key], made(key)) for key in keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (7,), (), (0, 3)])
def test_what_is_written_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"a": torch.randn(shape).to(dtype), "b": torch.randn(3, 3).to(dtype), "c": torch.randn(5)}
    TensorStore(tmp_path / "new").write(tensors)
    store = TensorStore(tmp_path / "new")
    assert len(store) == 3
    for key, tensor in tensors.items():
        assert store[key].dtype == tensor.dtype
        assert torch.equal(store[key], tensor)


def test_what_comes_back_is_a_copy(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    put(store, KEYS[:2])
    store[KEYS[0]].zero_()
    assert sound(store, KEYS[:2])
    assert sound(TensorStore(tmp_path), KEYS[:2])


def test_parts_of_one_tensor_are_stored_apart(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    whole = torch.randn(3, 4, 5)
    store.write({**dict(zip("abc", whole, strict=True)), "d": torch.randn(4, 5).T})
    assert all(torch.equal(store[key], part) for key, part in zip("abc", whole, strict=True))
    assert store["d"].shape == (5, 4)


def test_missing_keys_in_their_order_and_once(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "not-there")
    assert not store.folder.exists(), "looking makes no folder"
    put(store, ["c0", "a0"])
    assert store.missing(["b0", "a0", "b0", "c0", "a1"]) == ["b0", "a1"]
    assert "a0" in store
    assert "b0" not in store
    with pytest.raises(KeyError):
        store["b0"]


def test_nothing_to_write_leaves_nothing(tmp_path: Path) -> None:
    TensorStore(tmp_path / "new").write({})
    assert not (tmp_path / "new").exists()


def test_refresh_sees_what_others_wrote_and_deleted(tmp_path: Path) -> None:
    one, other = TensorStore(tmp_path), TensorStore(tmp_path)
    put(one, KEYS[:3])
    assert other.missing(KEYS[:3]) == KEYS[:3]
    other.refresh()
    assert sound(other, KEYS[:3])
    put(other, KEYS[3:5])
    one.refresh()
    assert sound(one, KEYS[:5])
    first = next(
        file for file in shards(tmp_path) if file.stat().st_size == max(f.stat().st_size for f in shards(tmp_path))
    )
    first.unlink()
    one.refresh()
    assert one.missing(KEYS[:5]) == KEYS[:3]
    assert sound(one, KEYS[3:5])


DAMAGE = {
    "zero bytes": lambda content: b"",
    "three bytes": lambda content: content[:3],
    "half": lambda content: content[: len(content) // 2],
    "all but the last byte": lambda content: content[:-1],
    "a byte too many": lambda content: content + b"x",
    "header bomb": lambda content: (10**15).to_bytes(8, "little") + content[8:],
    "header as long as the file": lambda content: (len(content) - 8).to_bytes(8, "little") + content[8:],
    "no JSON": lambda content: content[:8] + b"!" + content[9:],
    "a list": lambda content: (2).to_bytes(8, "little") + b"[]",
    "deep": lambda content: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a changed offset": lambda content: content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
    "a changed shape": lambda content: content.replace(b'"shape":[2,', b'"shape":[9,'),
    "another dtype": lambda content: content.replace(b'"F16"', b'"X16"'),
    "noise": lambda content: random.Random(0).randbytes(len(content)),
    "a pickle": lambda content: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_passed_over_and_made_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(TensorStore(tmp_path), KEYS[:3])
    (file,) = shards(tmp_path)
    content = file.read_bytes()
    assert DAMAGE[damage](content) != content
    file.write_bytes(DAMAGE[damage](content))
    put(TensorStore(tmp_path), KEYS[3:6])
    caplog.clear()
    store = TensorStore(tmp_path)
    store.refresh()
    assert [file.name in record.getMessage() for record in caplog.records] == [True], "warned of, once"
    assert store.missing(KEYS[:6]) == KEYS[:3]
    put(store, KEYS[:3])
    assert sound(store, KEYS[:6])
    assert sound(TensorStore(tmp_path), KEYS[:6])
    assert file.read_bytes() == DAMAGE[damage](content), "nothing is deleted"


def test_what_others_put_there_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(TensorStore(tmp_path), KEYS[:2])
    save_file({"weight": torch.zeros(3, dtype=torch.int64)}, tmp_path / "foreign.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "folder.safetensors").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")  # to open it would take for ever
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    store = TensorStore(tmp_path)
    assert sound(store, KEYS[:2])
    assert [record.args[0].name for record in caplog.records] == ["foreign.safetensors"]


def test_a_shard_that_goes_away_while_in_use(tmp_path: Path) -> None:
    put(TensorStore(tmp_path), KEYS[:2])
    open_, closed, short = TensorStore(tmp_path), TensorStore(tmp_path), TensorStore(tmp_path)
    assert sound(open_, KEYS[:1])
    (file,) = shards(tmp_path)
    content = file.read_bytes()
    file.unlink()
    assert sound(open_, KEYS[:2]), "it is mapped, so it lives on"
    with pytest.raises(OSError, match="was deleted while in use"):
        closed[KEYS[0]]
    file.write_bytes(content[:50])
    with pytest.raises(OSError, match="changed while in use"):
        short[KEYS[0]]
    closed.refresh()
    open_.refresh()


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 20)
    writer = TensorStore(tmp_path)
    for key in KEYS:
        put(writer, [key])
    store = TensorStore(tmp_path)
    order = KEYS * 2
    random.Random(0).shuffle(order)
    assert sound(store, order)
    assert len(store._maps) == 20


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
def test_no_file_is_held_open(tmp_path: Path) -> None:
    for key in KEYS[:50]:
        put(TensorStore(tmp_path), [key])
    store = TensorStore(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert sound(store, KEYS[:50])
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_old_leftovers_are_deleted(tmp_path: Path) -> None:
    names = [f".partial-{i * 32}.safetensors" for i in "abc"]
    for name, age in zip(names, (ABANDONED + 60, ABANDONED - 3600, 0), strict=True):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / ".partial-mine.txt").write_text("mine")
    os.utime(tmp_path / ".partial-mine.txt", (0, 0))
    store = TensorStore(tmp_path)
    assert len(store) == 0
    assert len(list(tmp_path.iterdir())) == 4, "who only reads deletes nothing"
    put(store, KEYS[:1])
    assert {file.name for file in tmp_path.iterdir()} == {*names[1:], ".partial-mine.txt", shards(tmp_path)[0].name}


def test_a_host_whose_clock_is_ahead_deletes_nothing_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / f".partial-{'a' * 32}.safetensors"
    other.write_bytes(b"half")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * ABANDONED)
    put(TensorStore(tmp_path), KEYS[:1])
    assert other.read_bytes() == b"half"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file/cache: .* could not be written"):
        put(TensorStore(tmp_path / "file" / "cache"), KEYS[:1])


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
@forks
def test_a_full_disk_leaves_the_store_whole(tmp_path: Path) -> None:
    def write_on_a_full_disk() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is too long then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        store = TensorStore(tmp_path / "store")
        put(store, KEYS[:10])
        with pytest.raises(OSError, match=r"could not be written .* make room, or choose another cache_dir"):
            put(store, KEYS[10:300])
        assert store.missing(KEYS[:300]) == KEYS[10:300]
        put(store, KEYS[10:20])

    log = tmp_path / "log.txt"
    live(write_on_a_full_disk, log)
    assert len(list((tmp_path / "store").iterdir())) == 2
    store = TensorStore(tmp_path / "store")
    assert store.missing(KEYS[:300]) == KEYS[20:300]
    assert sound(store, KEYS[:20])


@forks
def test_several_processes_write_and_read_at_once(tmp_path: Path) -> None:
    def work(first: int) -> None:
        store = TensorStore(tmp_path / "store")
        for i in range(first, 200, 2):
            put(store, KEYS[i : i + 4])  # some of which the other writes too
            store.refresh()
            assert sound(store, [key for key in KEYS if key in store])

    log = tmp_path / "log.txt"
    children = start(lambda: work(0), log) + start(lambda: work(1), log)
    while not (tmp_path / "store").is_dir():
        time.sleep(0.001)
    seen = 0
    while seen < 200:
        store = TensorStore(tmp_path / "store")
        assert sound(store, [key for key in KEYS if key in store])
        seen = len(store)
    assert wait(children) == [0, 0], log.read_text()


@forks
def test_a_killed_writer_leaves_whole_shards_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write_for_ever() -> None:
        store, i = TensorStore(tmp_path / "store"), 0
        large = torch.zeros(300_000)
        while True:
            store.write({KEYS[i % 400]: made(KEYS[i % 400]), f"{os.getpid()}-{i}": large})
            i += 1

    chance, log, folder = random.Random(1), tmp_path / "log.txt", tmp_path / "store"
    for _ in range(30):
        before = len(list(folder.glob("*")))
        children = start(write_for_ever, log)
        while len(list(folder.glob("*"))) == before:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        kill(children)
        assert wait(children) == [-9], log.read_text()
        store = TensorStore(folder)
        assert sound(store, [key for key in KEYS if key in store])
    assert len(store) > 0
    assert list(folder.glob(".partial-*")), "no life ended in the middle of a write"
    assert not caplog.records, "nothing half-written was taken for a shard"
    put(store, store.missing(KEYS))
    assert sound(TensorStore(folder), KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_it(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TensorStore(tmp_path)
    for i in range(0, 12, 3):
        put(store, KEYS[i : i + 3])
    assert sound(store, KEYS[:12])
    keys = [KEYS[i : i + 3] for i in range(0, 12, 3)]
    batches = DataLoader(store, batch_sampler=keys, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(batches)), torch.stack([made(key) for key in KEYS[:12]]))


def test_a_pickled_store_reads_the_same(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    put(store, KEYS[:3])
    assert sound(store, KEYS[:3])
    content = pickle.dumps(store)
    assert len(content) < 1500, "maps do not travel"
    assert sound(pickle.loads(content), KEYS[:3])
