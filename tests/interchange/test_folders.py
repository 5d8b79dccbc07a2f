import json
import struct
from importlib import import_module
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from latentdiff.interchange import check_pipeline_folder, check_safetensors, find_model, packaged_model, packaged_models
from latentdiff.interchange.folders import OUR_MODULES


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    weights = tmp_path / "weights"
    (weights / "emoji").mkdir(parents=True)
    (weights / "emoji" / "model_index.json").write_text("{}")
    (weights / "unfinished").mkdir()
    monkeypatch.setattr("latentdiff.interchange.folders.WEIGHTS", weights)
    return weights


def test_packaged_models_are_found_by_name(packaged: Path) -> None:
    assert packaged_models() == {"emoji": packaged / "emoji"}
    assert packaged_model() == find_model(None) == find_model("emoji") == packaged / "emoji"
    with pytest.raises(FileNotFoundError, match=r"no model named 'flowers' .* it has emoji"):
        packaged_model("flowers")


def test_a_packaged_name_wins_over_a_folder(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert find_model("emoji") == packaged / "emoji"
    assert find_model("./emoji") == Path("emoji")


def test_an_installation_without_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentdiff.interchange.folders.WEIGHTS", tmp_path / "none")
    for source in (None, "emoji"):
        with pytest.raises(FileNotFoundError, match="built without its weights"):
            find_model(source)


def test_hub_ids_and_missing_paths_are_told_apart(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name") is None
    (tmp_path / "owner").mkdir()  # now the first part is a folder here
    for missing in ("owner/name", "name", "a/b/c", "/no/where", "./no", "../x y"):
        with pytest.raises(FileNotFoundError, match=r"no such folder; give a folder .* \(emoji\)"):
            find_model(missing)
    with pytest.raises(FileNotFoundError):
        find_model(Path("who/what"))  # a Path is never a hub id


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.float16)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_whole_weights_pass(weights: Path) -> None:
    check_safetensors(weights)
    save_file({}, weights)
    check_safetensors(weights)


def test_damage_is_told(weights: Path) -> None:
    whole = weights.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    damaged = {
        "bytes and should have": whole[:-1],
        "should have": whole + b"x",
        "too few": whole[: 8 + header - 1],
        "not a safetensors file": b"PK\x03\x04 something else entirely",
        "too few bytes|too few": b"",
        "header cannot be read": whole[:8] + b"x" * header + whole[8 + header :],
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    }
    for message, content in damaged.items():
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=message) as raised:
            check_safetensors(weights)
        assert str(weights) in str(raised.value)


def test_indices_are_followed(tmp_path: Path, weights: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "U"], "vae": [None, None], "n": [1, 2, 3]}))
    check_pipeline_folder(tmp_path)
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (unet / "model.safetensors.index.json").write_text(json.dumps(shards))
    (unet / "model-1.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing; model\.safetensors\.index\.json"):
        check_pipeline_folder(tmp_path)
    check_pipeline_folder(tmp_path, given=["unet"])
    (unet / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged: not JSON"):
        check_pipeline_folder(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match=r"model_index\.json is damaged: a JSON object is expected, not a list"):
        check_pipeline_folder(tmp_path)


def test_modules_that_folders_name_have_what_diffusers_loader_looks_for() -> None:
    for name in OUR_MODULES:
        assert import_module(name).ModelMixin is diffusers.ModelMixin
