"""Where very many tensors lie is in a file that is mapped, and only what is not in it is looked for."""

import pickle
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.interchange.shared_cache import INDEX, delete, shards
from latentdiff.training.batch import cache as cache_module
from latentdiff.training.batch.cache import TensorStore, digest
from latentdiff.training.batch.filling import Batches, fill
from latentdiff.training.batch.key_index import KeyIndex

KEYS = [digest(i) for i in range(200)]


def made(key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int(key[:8], 16))
    return torch.randn(2, 3 + int(key[0], 16) % 2, generator=generator).half()


def put(folder: Path, keys: list[str], each: int = 10) -> None:
    store = TensorStore(folder)
    for start in range(0, len(keys), each):
        store.write({key: made(key) for key in keys[start : start + each]})


def sound(store: TensorStore, keys: list[str]) -> bool:
    return not store.missing(keys) and all(torch.equal(store[key], made(key)) for key in keys)


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with all keys but the last fifty in its index, which further twenty are enough for to be made anew."""
    monkeypatch.setattr(cache_module, "INDEXED", 20)
    folder = tmp_path / "latents" / digest("a model")
    put(folder, KEYS[:150])
    TensorStore(folder).index()
    return folder


def test_no_file_of_the_index_is_looked_at_again(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(cache_module, "contents", None)
        store = TensorStore(indexed)
    assert len(store) == 150
    assert not store._places
    assert sound(store, KEYS[:150])
    assert store.missing(KEYS) == KEYS[150:]
    assert store.missing(["", "a", KEYS[0].upper(), KEYS[0] + "00"]) == ["", "a", KEYS[0].upper(), KEYS[0] + "00"]
    with pytest.raises(KeyError):
        store[KEYS[150]]
    put(indexed, KEYS[140:160])
    store.refresh()
    assert (len(store), len(store._places)) == (160, 10)
    assert sound(pickle.loads(pickle.dumps(store)), KEYS[:160])
    store.index()
    assert len(store._places) == 10, "too few"
    put(indexed, KEYS[160:])
    store.refresh()
    store.index()
    assert (len(store), len(store._places)) == (200, 0)
    assert sound(store, KEYS)
    assert sound(TensorStore(indexed), KEYS)


def test_what_other_processes_do(indexed: Path) -> None:
    store = TensorStore(indexed)
    put(indexed, KEYS[150:])
    other = TensorStore(indexed)
    other.index()
    store.refresh()
    assert (len(store), len(store._places)) == (200, 0)
    first = next(file for file in sorted(indexed.glob("*.safetensors")) if file.name in store._sizes)
    first.unlink()
    store.refresh()
    assert len(store) == 190
    assert sound(store, [key for key in KEYS if key in store])
    assert len(TensorStore(indexed)) == 190
    store.index()
    assert not store._places, "it is made anew"
    assert sound(TensorStore(indexed), [key for key in KEYS if key in store])


DAMAGE = {
    "zero bytes": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a byte too many": lambda content: content + b"x",
    "header bomb": lambda content: (10**15).to_bytes(8, "little") + content[8:],
    "no JSON": lambda content: content[:8] + b"!" + content[9:],
    "a list": lambda content: (2).to_bytes(8, "little") + b"[]",
    "another version": lambda content: content.replace(b'"format": 1', b'"format": 9'),
    "a number for a count": lambda content: content.replace(b'"count": 150', b'"count": -15'),
    "noise": lambda content: random.Random(0).randbytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_passed_over_and_made_anew(indexed: Path, damage: str) -> None:
    file = indexed / INDEX
    content = file.read_bytes()
    assert DAMAGE[damage](content) != content
    file.write_bytes(DAMAGE[damage](content))
    assert KeyIndex.read(file) is None
    store = TensorStore(indexed)
    assert len(store._places) == 150
    assert sound(store, KEYS[:150])
    store.index()
    assert sound(TensorStore(indexed), KEYS[:150])
    assert len(TensorStore(indexed)._places) == 0


def test_keys_that_begin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "INDEXED", 1)
    keys = ["0" * 16 + key[16:] for key in KEYS[:30]] + ["f" * 16 + key[16:] for key in KEYS[:30]] + KEYS[30:60]
    for some in (keys[::2], keys[1::2]):
        put(tmp_path, some)
        TensorStore(tmp_path).index()
    assert sound(TensorStore(tmp_path), keys)
    assert TensorStore(tmp_path).missing(["0" * 40, "f" * 40]) == ["0" * 40, "f" * 40]


def test_other_names_than_digests_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "INDEXED", 1)
    store = TensorStore(tmp_path)
    store.write({"a": torch.zeros(2)})
    store.index()
    assert not (tmp_path / INDEX).exists()


def test_filling_makes_it_and_deleting_takes_it_away(indexed: Path) -> None:
    def encode(batches: Batches) -> Iterator[Mapping[str, Tensor]]:
        for keys in batches:
            yield {key: made(key) for key in keys}

    store = TensorStore(indexed)
    fill(store, KEYS, encode, Accelerator(cpu=True), batch_size=4, things="pictures")
    assert (len(store), len(store._places)) == (200, 0)
    assert sound(TensorStore(indexed), KEYS)
    delete(shards(indexed.parents[1]))
    assert not list(indexed.glob(INDEX))
    assert len(TensorStore(indexed)) == 0
