"""Tables that are no files, or have no end: refused by name, soon and in little memory."""

import os
from pathlib import Path

import datasets
import pytest

from latentdiff.training.data.load import load_pictures


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_table_of_a_terabyte(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match=rf"{name}(, line 1: it is longer than 64 MiB| is larger than 1024 MiB)"):
        load_pictures(str(tmp_path))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "a.tar", "a.txt"])
def test_table_that_is_a_link_to_itself(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(name)
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        load_pictures(str(tmp_path))


@pytest.mark.parametrize("harm", ["pipe", "cut", "state", "info"])
def test_saved_datasets_that_are_damaged(harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"image": {"bytes": b"", "path": None}, "text": "a"}]).save_to_disk(folder)
    arrow = next(folder.glob("*.arrow"))
    if harm == "pipe":
        arrow.unlink()
        os.mkfifo(arrow)
    elif harm == "cut":
        arrow.write_bytes(arrow.read_bytes()[:40] + b"\xff" * 9)
    elif harm == "state":
        (folder / "state.json").write_text("[]")
    else:
        (folder / "dataset_info.json").unlink()
    with pytest.raises((ValueError, OSError), match=str(folder)):
        load_pictures(str(folder))
