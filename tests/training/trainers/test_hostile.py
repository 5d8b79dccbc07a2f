"""Training on a folder of damaged and hostile pictures goes on with the good ones, and names the others."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hostile import hostile_folder, state

from latentdiff.training.batch.latents import LatentCache
from latentdiff.training.settings import AutoencoderSettings, DenoiserSettings
from latentdiff.training.starting_networks import load_autoencoder
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.denoiser import train_denoiser

pytestmark = pytest.mark.slow


def test_nothing_good_is_lost_and_all_bad_is_named(
    denoiser_settings: dict[str, Any], tmp_path: Path, shared_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, good, bad = hostile_folder(tmp_path / "hostile")
    assert len(good) + len(bad) >= 200
    before = state(folder)
    with caplog.at_level(logging.INFO, logger="latentdiff"):
        output = tmp_path / "out"
        changes = {"data": str(folder), "output": str(output), "max_bad_share": 1.0, "max_steps": 40}
        train_denoiser(DenoiserSettings.load(None, {**denoiser_settings, **changes, "random_flip": False}))
    assert state(folder) == before, "the user's files are as they were"
    entries = [json.loads(line) for line in (output / "training" / "manifest-train.jsonl").read_text().splitlines()]
    used = {entry["name"].partition(" (")[0]: entry for entry in entries if "name" in entry}
    assert [name for name in good if not used[name]["use"]] == []
    assert [name for name in bad if used[name]["use"] or not used[name]["reason"]] == []
    assert f"{len(bad)} left out" in caplog.text
    cache = LatentCache(shared_cache / "latents", load_autoencoder(denoiser_settings["autoencoder"]))
    assert len(cache.store) == len({used[name]["digest"] for name in good})


def test_too_many_bad_ones_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    folder, _, bad = hostile_folder(tmp_path / "hostile")
    values = {"data": str(folder), "output": str(tmp_path / "out"), "block_out_channels": (8, 16)}
    settings = AutoencoderSettings.load(None, {**values, "norm_num_groups": 4, "resolution": 16, "max_steps": 1000})
    with pytest.raises(ValueError, match=rf"{len(bad)} of \d+ pictures cannot be used, .* latentdiff doctor|doctor"):
        train_autoencoder(settings)
    assert not (tmp_path / "out" / "training" / "checkpoints").exists()
