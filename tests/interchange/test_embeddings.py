"""Embeddings of new words between diffusers' and A1111's formats; a pickle runs nothing."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latentdiff.interchange.embeddings import convert_embedding

VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "cup", "step": 900}


class Runs:
    """What a pickle can hold: an order to run something when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def save(content: Any, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("content", "name", "source_format", "word"),
    [
        ({"<cup>": VECTORS}, "learned_embeds.safetensors", "diffusers", "<cup>"),
        ({"emb_params": VECTORS}, "cup.safetensors", "a1111", "cup"),
        ({"<cup>": VECTORS}, "learned_embeds.bin", "diffusers", "<cup>"),
        (A1111, "other.pt", "a1111", "cup"),
        ({**A1111, "name": None}, "cup.pt", "a1111", "cup"),
        ({"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)})}, "cup.pt", "a1111", "cup"),
        ({"string_to_param": {"*": VECTORS.requires_grad_(False)}, "name": "cup"}, "x.bin", "a1111", "cup"),
    ],
)
def test_round_trips(tmp_path: Path, content: Any, name: str, source_format: str, word: str) -> None:
    source = save(content, tmp_path / name)
    report = convert_embedding(source, tmp_path / "new.safetensors", allow_pickle=True)
    assert (report.source_format, report.words) == (source_format, {word: (3, 16)})
    assert torch.equal(load_file(report.file)[word], VECTORS)
    convert_embedding(report.file, tmp_path / "back.safetensors", to="a1111")
    assert torch.equal(load_file(tmp_path / "back.safetensors")["emb_params"], VECTORS)
    renamed = convert_embedding(tmp_path / "back.safetensors", tmp_path / "a/b/mug.safetensors", token="<mug>")
    assert torch.equal(load_file(renamed.file)["<mug>"], VECTORS)


def test_one_vector_and_folders(tmp_path: Path) -> None:
    save({"<cup>": VECTORS[0].clone()}, tmp_path / "learned_embeds.safetensors")
    report = convert_embedding(tmp_path, tmp_path / "new.safetensors")
    assert report.words == {"<cup>": (1, 16)}
    two = save({"<cup>": VECTORS, "<mug>": VECTORS + 1}, tmp_path / "two.safetensors")
    assert len(convert_embedding(two, tmp_path / "both.safetensors").words) == 2
    with pytest.raises(ValueError, match=r"holds 2 words \(<cup>, <mug>\)"):
        convert_embedding(two, tmp_path / "one.safetensors", to="a1111")
    with pytest.raises(ValueError, match="one token cannot name them"):
        convert_embedding(two, tmp_path / "one.safetensors", token="<x>")


@pytest.mark.parametrize("name", ["cup.pt", "cup.bin", "cup.safetensors"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "plain pickle"])
def test_a_pickle_runs_nothing(tmp_path: Path, name: str, old: bool) -> None:
    content = {"<cup>": Runs(tmp_path / "it ran")}
    if old:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    for allow in (False, True):
        with pytest.raises(ValueError, match=r"only safetensors files are read|damaged|holds more than tensors"):
            convert_embedding(tmp_path / name, tmp_path / "new.safetensors", allow)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": VECTORS, "clip_g": VECTORS + 1}, "Stable Diffusion XL"),
        ({"<cup>": torch.full((2, 16), torch.nan)}, "not finite"),
        ({"<cup>": torch.zeros(2, 16, dtype=torch.int64)}, "int64"),
        ({"<cup>": torch.zeros(2, 3, 16)}, r"shape \(2, 3, 16\)"),
        ({"<cup>": torch.zeros(0, 16)}, r"shape \(0, 16\)"),
        ({" ": VECTORS}, "cannot be a word"),
        ({"a\nb": VECTORS}, "cannot be a word"),
        ({}, "no embeddings"),
    ],
)
def test_what_holds_no_embeddings_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_embedding(tmp_path / "x.safetensors", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["<cup>", VECTORS], "but a list"),
        (3, "but a int"),
        ({"<cup>": "vectors"}, "is a str, not a tensor"),
        ({"string_to_param": {}, "name": "cup"}, "holds 0 embeddings"),
        ({"string_to_param": {"*": VECTORS, "+": VECTORS}, "name": "cup"}, "holds 2 embeddings"),
        ({"string_to_param": {"*": VECTORS}, "name": 3}, "3 cannot be a word"),
        ({3: VECTORS}, "3 cannot be a word"),
    ],
)
def test_pickles_of_other_things_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        convert_embedding(tmp_path / "x.pt", tmp_path / "new.safetensors", allow_pickle=True)


def test_damaged_files_and_wrong_targets(tmp_path: Path) -> None:
    source = save({"<cup>": VECTORS}, tmp_path / "cup.safetensors")
    content = source.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-10])
    torch.save(A1111, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-200])
    (tmp_path / "empty.pt").touch()
    for name in ("cut.safetensors", "cut.pt", "empty.pt"):
        with pytest.raises(ValueError, match="damaged"):
            convert_embedding(tmp_path / name, tmp_path / "new.safetensors", allow_pickle=True)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert_embedding(tmp_path / "owner/name", tmp_path / "new.safetensors")
    with pytest.raises(ValueError, match=r"ending in \.safetensors"):
        convert_embedding(source, tmp_path / "new.bin")
    with pytest.raises(ValueError, match="choose from diffusers, a1111"):
        convert_embedding(source, tmp_path / "new.safetensors", to="x")  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="is there already"):
        convert_embedding(source, source)
    assert source.read_bytes() == content
    assert not (tmp_path / "new.safetensors").exists()
    convert_embedding(source, source, token="<mug>", overwrite=True)
    assert list(load_file(source)) == ["<mug>"]
