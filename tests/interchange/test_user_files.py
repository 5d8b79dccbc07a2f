"""Files that other people made: what is no regular file, too large or too deep is refused, with the file's name."""

import os
from pathlib import Path

import pytest

from latentdiff.interchange.folders import check_component, check_safetensors
from latentdiff.interchange.user_files import MAX_YAML, parse_json, parse_yaml, read_bytes, read_text, read_yaml


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "device"])
def test_only_regular_files_are_read(make: object, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    make(file)  # type: ignore[operator]
    for read in (read_bytes, read_text, read_yaml, check_safetensors):
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
