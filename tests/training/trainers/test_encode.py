"""The cache filled by jobs of its own is what a training would have filled."""

import os
import shutil
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from safetensors.torch import load_file
from tars import write
from typer.testing import CliRunner

from latentdiff.training.cli import launched
from latentdiff.training.data import survey
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.encode import encode


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(5):
        members = {}
        for i in range(9):
            members[f"{i}.png"] = hostile.encode(hostile.noise(10 * number + i))
            members[f"{i}.txt"] = f"a thing, {'abc'[i % 3]}, {'de'[number % 2]}".encode()
        write(folder / f"data-{number}.tar", members)
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for kind in ("latents", "text") for path in (folder / kind).rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("in_shards", [True, False])
def test_parts_make_the_cache_of_a_training(
    in_shards: bool,
    denoiser_settings: dict[str, Any],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {**denoiser_settings, "max_steps": 2, "crop": "random", "cached_variants": 2, "held_out_share": 0.2}
    values |= {"caption_shuffle": True, "random_flip": "auto"}
    if in_shards:
        values["data"] = str(shards)

    def settings(output: str, **more: object) -> DenoiserSettings:
        return DenoiserSettings.load(None, {**values, "output": str(tmp_path / output), **more})

    plain = train_denoiser(settings("plain"))
    parts = 3
    for number in range(1, parts + 1):
        encode(settings(f"part-{number}"), (number, parts))
    assert all(files(tmp_path / f"part-{number}") for number in range(1, parts + 1))
    before = files(tmp_path / "part-2")
    encode(settings("part-2"), (2, parts))
    assert files(tmp_path / "part-2") == before, "a job that is repeated has nothing left to do"

    joined = tmp_path / "joined"
    for number in range(1, parts + 1):
        shutil.copytree(tmp_path / f"part-{number}", joined, copy_function=os.link, dirs_exist_ok=True)
    before = files(joined)
    decoded = []
    if in_shards:
        monkeypatch.setattr(survey, "decode", lambda *arguments: decoded.append(arguments))
    trained = train_denoiser(settings("trained", cache_dir=str(joined)))
    assert files(joined) == before, "nothing was missing"
    assert not decoded, "the jobs have examined the pictures"
    weights = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (plain, trained)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-3)


def test_what_cannot_be_a_part(tmp_path: Path) -> None:
    for shard in ("0/3", "4/3", "1", "a/b", "1/0"):
        options = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--shard", shard]
        found = CliRunner().invoke(launched, ["encode", "emoji", *options])
        assert isinstance(found.exception, ValueError)
        assert "the K-th of N parts" in str(found.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(shards: Path, tmp_path: Path) -> None:
    options = ["--data", str(shards), "--output", str(tmp_path / "out"), "--shard", "2/5", "resolution=16"]
    found = CliRunner().invoke(launched, ["encode", "emoji", *options], catch_exceptions=False)
    assert f"cache_dir={tmp_path / 'out'}" in found.output.replace("\n", "")
    assert files(tmp_path / "out")
    assert (tmp_path / "out/training/manifest-train-2-of-5.jsonl").is_file()
    with pytest.raises(FileNotFoundError, match="5 shards cannot be split 6 ways"):
        CliRunner().invoke(launched, ["encode", "emoji", *options[:-2], "6/6", "resolution=16"], catch_exceptions=False)
