import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import forks, live
from PIL import Image
from safetensors.torch import save_file

from latentdiff.interchange.adapter_files import save_whole
from latentdiff.interchange.atomic import atomic_file, atomic_folder, write_text_whole
from latentdiff.interchange.png import check_output, save_picture
from latentdiff.models import AutoencoderTiny


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_written_whole(sync: bool, tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "table.json"
    with atomic_file(file, sync) as partial:
        assert partial.parent == file.parent
        assert partial.suffix == ".json"
        partial.write_text("half")
        assert not file.exists()
        partial.write_text("whole")
    assert file.read_text() == "whole"
    assert [path.name for path in file.parent.iterdir()] == ["table.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode  # readable by whoever may read other files


def test_after_an_error_the_file_is_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    write_text_whole(file, "grün")

    def fail() -> None:
        with atomic_file(file) as partial:
            partial.write_text("other")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert file.read_text(encoding="utf-8") == "grün"
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    with atomic_file(file) as one:
        one.write_text("one")
        with atomic_file(file) as other:
            other.write_text("other")
        assert file.read_text() == "other"
    assert file.read_text() == "one"


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow above 1,000 bytes, which goes wrong in the same places as a full disk.

    The limit holds for the whole process: what pytest itself prints to a file too. So it stands around the write alone.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_folder(folder: Path) -> None:
    with atomic_folder(folder) as new:
        new.mkdir()
        (new / "a.txt").write_text("x" * 9999)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda file: write_text_whole(file, "x" * 9999),
    "safetensors": lambda file: save_whole({"a": torch.zeros(9999)}, file),
    "picture": lambda file: save_picture(Image.effect_noise((64, 64), 50), file),
    "folder": save_folder,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_an_error_that_names_the_file(writer: str, tmp_path: Path) -> None:
    file = tmp_path / "result.png"
    with pytest.raises(OSError, match=r"result\.png"), full_disk():
        WRITERS[writer](file)
    assert not file.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
def test_what_others_may_read_is_left_to_the_umask(tmp_path: Path) -> None:
    save_whole({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with atomic_folder(tmp_path / "folder") as new:
        (new / "unet").mkdir(parents=True)
        save_file({"a": torch.zeros(2)}, new / "unet" / "a.safetensors")
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert [file.stat().st_mode for file in tmp_path.rglob("a.safetensors")] == [usual, usual]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
def test_of_a_network_too_and_files_beside_it_stay(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    sides = {f"{side}_block_out_channels": (8,) for side in ("encoder", "decoder")}
    network = AutoencoderTiny(**sides, num_encoder_blocks=(1,), num_decoder_blocks=(0,))
    for _ in range(2):
        network.save_pretrained(tmp_path)
        modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
        assert modes["diffusion_pytorch_model.safetensors"] == modes["config.json"]
        assert modes["other.safetensors"] & 0o777 == 0o600


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"), atomic_file(tmp_path / "a.txt"):
        (tmp_path / "absent.txt").read_text()


def test_a_null_byte_in_a_name_is_named(tmp_path: Path) -> None:
    for write in (lambda name: write_text_whole(name, ""), lambda name: atomic_folder(name).__enter__()):
        with pytest.raises(ValueError, match=r"a\\x00b' has a null byte, which no name of a file"):
            write(tmp_path / "a\0b")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_where_nothing_can_be_written_the_file_is_named_and_not_the_partial_one() -> None:
    with pytest.raises(FileNotFoundError, match=r"'/proc/car\.json'$"):
        write_text_whole(Path("/proc/car.json"), "{}")
    with pytest.raises(FileNotFoundError, match=r"'/proc/model'$"), atomic_folder(Path("/proc/model")):
        raise AssertionError


@forks
def test_a_folder_of_others_is_refused_beforehand(tmp_path: Path) -> None:
    def ask() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(PermissionError, match=r"^/usr/new/car\.png: you may not write into /usr; choose another"):
            check_output(Path("/usr/new/car.png"))

    log = tmp_path / "log.txt"
    live(ask, log)
