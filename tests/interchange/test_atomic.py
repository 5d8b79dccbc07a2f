from pathlib import Path

import pytest

from latentdiff.interchange.atomic import atomic_file, write_text_whole


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
