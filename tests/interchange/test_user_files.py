"""Files that other people made: what is no regular file, too large or too deep is refused, with the file's name."""

import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.interchange.folders import check_component, check_safetensors
from latentdiff.interchange.picture_files import read_picture
from latentdiff.interchange.png import check_output, read_settings
from latentdiff.interchange.single_file import Checkpoint, OriginalSettings
from latentdiff.interchange.user_files import MAX_YAML, parse_json, parse_yaml, read_bytes, read_text, read_yaml
from latentdiff.metrics.extractors import read_weights


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_only_regular_files_are_read(make: object, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    make(file)  # type: ignore[operator]
    for read in (read_bytes, read_text, read_yaml, check_safetensors, read_picture, Checkpoint):
        with pytest.raises(ValueError, match=r"config\.json is a pipe or a device, not a regular file"):
            read(file)


def test_pipe_in_a_component(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "unet" / "merges.txt")
    with pytest.raises(ValueError, match=r"merges\.txt is a pipe or a device"):
        check_component(tmp_path, "unet", "UNet2DConditionModel")


def test_links_to_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "link").symlink_to("blob")
    assert read_text(tmp_path / "link") == "one\ntwo"


def test_what_is_not_there_or_too_large(tmp_path: Path) -> None:
    for name in ("absent", "absent/file", "null\0byte"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_text(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_text(tmp_path)
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match=r"sparse is larger than 64 MiB"):
        read_text(tmp_path / "sparse")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin is not UTF-8 text .* at byte 3"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000, '{"a": 1} 2'])
def test_json_names_its_file(text: str) -> None:
    with pytest.raises(ValueError, match=r"^x\.json: not JSON"):
        parse_json(text, "x.json")


DOUBLING = "a: &a0 [1, 1]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(30))
MERGING = "a: &a0 {k: 1}\n" + "".join(f"b{i}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: 2", r"^x\.yaml, line 2: not YAML"),
        ("a: 1\nb: !!python/object:os.system x", r"^x\.yaml, line 2: not YAML \(could not determine a constructor"),
        ("a: 2001-99-99", r"^x\.yaml: not YAML \(month must be"),
        ("!!bool perhaps", r"^x\.yaml: not YAML"),
        ("[" * 100_000, r"^x\.yaml: YAML that is nested too deeply"),
        ("a: \0", r"^x\.yaml: not YAML"),
        (DOUBLING, "stand for too many values"),
        (MERGING, "stand for too many values"),
        ("a: &a [*a]", "stand for too many values"),
    ],
)
def test_yaml_names_its_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text, "x.yaml")


def test_yaml_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("usual: &usual {a: 1e-4, b: [1]}\nmine: {<<: *usual, b: 2}\n")
    assert read_yaml(file) == {"usual": {"a": "1e-4", "b": [1]}, "mine": {"a": "1e-4", "b": 2}}
    file.write_text("")
    assert read_yaml(file) is None
    file.write_text("#" * MAX_YAML + "\n")
    with pytest.raises(ValueError, match="larger than"):
        read_yaml(file)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": {"format": {"of": "pt"}}, "a": ENTRY},
        {"__metadata__": ["pt"], "a": ENTRY},
        {"a": ENTRY | {"data_offsets": ["0", "4"]}},
        {"a": ENTRY | {"data_offsets": [4]}},
        {"a": ENTRY | {"data_offsets": {"0": 4}}},
        {"a": ENTRY | {"shape": [2]}},
        {"a": ENTRY | {"dtype": "F7"}},
        {"a": [ENTRY]},
        [ENTRY],
    ],
    ids=str,
)
def test_odd_headers_of_weights(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    for read in (check_safetensors, Checkpoint):
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors.index.json", {"weight_map": ["a.safetensors"]}, "its weight_map should name a file"),
        ("model.safetensors.index.json", {"weight_map": {"a": 3}}, "its weight_map should name a file"),
        ("model.safetensors.index.json", {}, "its weight_map should name a file"),
        ("model.safetensors.index.json", {"weight_map": {}, "metadata": []}, "its metadata should be a JSON object"),
        ("config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000 should be a whole number"),
        ("config.json", {"num_train_timesteps": "many"}, "num_train_timesteps='many' should be a whole number"),
        ("config.json", {"num_train_timesteps": 0}, "num_train_timesteps=0 should be a whole number from 1 to 100,000"),
    ],
)
def test_configs_that_cannot_be(name: str, content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        check_component(tmp_path, "part", "DDIMScheduler")


def test_timesteps_of_an_original_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {params: {timesteps: 200000}}")
    with pytest.raises(ValueError, match=r"a\.yaml: timesteps=200000 should be .* at most 100000"):
        OriginalSettings.read(tmp_path / "a.yaml")


def test_pickle_that_inflates(tmp_path: Path) -> None:
    """6 GB of zeros deflate to 6 MB; here a hundredth of that."""
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "a.ckpt", "w") as evil:
        for part in good.infolist():
            more = bytes(60_000_000) if part.filename.endswith("data.pkl") else b""
            how = zipfile.ZIP_DEFLATED if more else zipfile.ZIP_STORED
            evil.writestr(part.filename, good.read(part) + more, compress_type=how)
    with pytest.raises(ValueError, match=r"a\.ckpt: its 'good/data.pkl' has 57 MiB, more than the limit of 32"):
        Checkpoint(tmp_path / "a.ckpt", allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be read as weights .*has 57 MiB, more than the limit"):
        read_weights(tmp_path / "a.ckpt")
    assert len(Checkpoint(tmp_path / "good.ckpt", allow_pickle=True)) == 1


@pytest.mark.parametrize("tensor", [torch.ones(1).expand(10_000, 10_000), torch.ones(3, 3).to_sparse()])
def test_tensors_that_claim_more_than_is_there(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": tensor}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: a claims more values than the file holds"):
        Checkpoint(tmp_path / "a.ckpt", allow_pickle=True)


def test_pipe_in_the_place_of_a_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") is None
    with pytest.raises(FileExistsError, match=r"a\.png exists and was not drawn by latentdiff"):
        check_output(tmp_path / "a.png")
