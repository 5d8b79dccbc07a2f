"""Data and models that there are not are refused before anything heavy is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from latentdiff.interchange.data_places import check_data
from latentdiff.interchange.hub import HubError, check_on_hub

LIGHT = """
import sys
from latentdiff.interchange.data_places import check_data
from latentdiff.pipelines.storage.places import find_place
from latentdiff.training.commands.settings_arguments import begin
from latentdiff.training.settings import FinetuneSettings

for refuse in (
    lambda: begin(FinetuneSettings(data="unitz", output="out")),
    lambda: find_place("nobody/none"),
):
    try:
        refuse()
    except OSError as error:
        print(error)
print([name for name in ("torch", "diffusers", "transformers", "datasets") if name in sys.modules])
"""


def test_what_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "unitz: no such folder; did you mean 'units'?",
        "nobody/none is not on this machine, and the hub cannot be reached; name a folder, or repeat it with a network",
        "[]",
    ], done.stderr


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "units").mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "somebody___my_birds").mkdir(parents=True)
    for there in ("units", "somebody/MyBirds", "shards/{0..9}.tar", "s3://bucket/0.tar"):
        check_data(there)
    for absent, told in (
        ("birds", "birds: no such folder; as a dataset, birds is not on this machine, and the hub cannot be reached"),
        (str(tmp_path / "unitz"), "unitz: not a folder; did you mean '.*units'"),
        ("./nothing", "not a folder; --data takes a folder of pictures, shards or a dataset name"),
    ):
        with pytest.raises(FileNotFoundError, match=told):
            check_data(absent)


def test_what_the_cache_of_the_hub_has_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--nobody--none").mkdir()
    check_on_hub("nobody/none")
    with pytest.raises(HubError, match="nobody/some is not on this machine"):
        check_on_hub("nobody/some")
