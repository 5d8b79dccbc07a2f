"""What is typed into the page leads nowhere but into the folders named at start."""

from pathlib import Path

import pytest

from latentdiff.pipelines.server.folders import Folders
from latentdiff.pipelines.server.requests import RequestError


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """``runs`` and ``/.../pictures`` are named, ``secret`` beside them is not."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/birds", "pictures/owls", "secret/keys", "runs-of-others"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "secret/keys/file").write_text("x")
    (tmp_path / "runs/out").symlink_to(tmp_path / "secret")
    (tmp_path / "runs/across").symlink_to(tmp_path / "pictures/owls")
    return Folders([Path("runs"), tmp_path / "pictures"])


def test_what_is_within(folders: Folders, tmp_path: Path) -> None:
    birds, owls = tmp_path / "runs/birds", tmp_path / "pictures/owls"
    for typed in ("runs/birds", "birds", str(birds), " birds ", "./birds"):
        assert folders.find(typed, "data") == birds
    for typed in ("pictures/owls", "owls", "runs/across"):
        assert folders.find(typed, "data") == owls
    assert (folders.label(birds), folders.label(owls)) == ("runs/birds", "pictures/owls")
    assert folders.find("runs/new/model", "output", there=False) == tmp_path / "runs/new/model"


@pytest.mark.parametrize(
    "typed",
    [
        *("secret", "../secret", "runs/../secret/keys", "out/keys/file", "runs/out", "runs/out/new", "/etc/passwd"),
        *("/", "~/.ssh", "..", "runs/..", "../runs-of-others", "birds/../../secret", "pictures/../secret/keys"),
    ],
)
def test_what_is_not(folders: Folders, tmp_path: Path, typed: str) -> None:
    """It makes no difference whether that is there."""
    for one in (typed, str(tmp_path / typed)):
        with pytest.raises(RequestError, match=r"is not within runs or pictures|there is no (secret|~/.ssh) within"):
            folders.find(one, "data")
    for one in ("../secret", "runs/out/new", str(tmp_path / "secret/new")):
        with pytest.raises(RequestError, match=r"output: .* is not within runs or pictures"):
            folders.find(one, "output", there=False)


def test_what_says_nothing(folders: Folders) -> None:
    for typed in ("", "  ", "a\0b"):
        with pytest.raises(RequestError, match="say a path within runs or pictures"):
            folders.find(typed, "data")
    with pytest.raises(RequestError, match="start the page with --folder DIR"):
        Folders([]).find("runs", "data")


def test_names_that_no_disk_takes(folders: Folders) -> None:
    for typed in ("a" * 5000, "\ud800"):
        with pytest.raises(RequestError, match=r"data: .* within runs or pictures"):
            folders.find(typed, "data")
