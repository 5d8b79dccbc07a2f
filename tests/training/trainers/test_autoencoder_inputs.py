"""What an autoencoder cannot be trained on or go on from is named, and what is merely unusual is not refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import autoencoder_settings

from latentdiff.training.batch import latents
from latentdiff.training.loop.checkpoints import digest_of
from latentdiff.training.trainers.autoencoder import train_autoencoder

VQ: dict[str, Any] = {"kind": "vq", "num_vq_embeddings": 16}


def test_pictures_with_values_that_are_no_numbers(pictures: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "metadata.jsonl").unlink()
    values = np.full((24, 24), 0.5, dtype=np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(data / "float.tiff")
    settings = autoencoder_settings(data, tmp_path / "out", max_steps=2, max_bad_share=0.01)
    with pytest.raises(ValueError, match=r"float\.tiff: .*pixels that are not numbers"):
        train_autoencoder(settings)


@pytest.mark.parametrize("kind", [{}, VQ])
def test_not_a_number_in_training_stops_the_run_and_names_the_pictures(
    kind: dict[str, Any], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = latents.read_pixels
    monkeypatch.setattr(latents, "read_pixels", lambda *args, **kwargs: read(*args, **kwargs) * math.nan)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0 .*\.png, .*\.png"):
        train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", max_steps=2, **kind))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("changes", [{}, {"crop": "random"}, {"buckets": True}])
def test_pictures_of_any_sides_are_trained_on(changes: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i, size in enumerate([(37, 19), (19, 37), (17, 17), (16, 64), (51, 23), (33, 16)]):
        noise = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / f"{i}.png")
    output = train_autoencoder(autoencoder_settings(data, tmp_path / "out", max_steps=3, **changes))
    figures = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    assert math.isfinite(figures["psnr"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vq", "num_vq_embeddings": 0}, "num_vq_embeddings"),
        ({"kind": "fsq", "fsq_levels": [5, 1]}, "fsq_levels"),
        ({"kind": "vae"}, "kind"),
        ({"resolution": 33}, "33 is not divisible by the factor 2"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"kind": "vq", "latent_shift": True}, "latent_shift is for kind=kl"),
        ({"kind": "vq", "logit_laplace_weight": 1.0}, "logit_laplace_weight is for kind=gumbel"),
    ],
)
def test_settings_that_make_no_autoencoder(
    changes: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", max_steps=2, **changes))


def test_another_bottleneck_than_the_run_began_with(pictures: Path, tmp_path: Path) -> None:
    train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", max_steps=2))
    for other in (VQ, {"kind": "fsq"}):
        with pytest.raises(ValueError, match=r"step-00000002: the run there was begun otherwise .*kind was"):
            train_autoencoder(autoencoder_settings(pictures, tmp_path / "out", max_steps=4, **other))


def test_a_run_begun_with_the_kl_weight_beside_a_mean_goes_on_with_what_it_is_now(
    pictures: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"resolution": 16, "learning_rate": 1e-2}
    straight = train_autoencoder(
        autoencoder_settings(pictures, tmp_path / "a", max_steps=4, kl_weight=0.0768, **common)
    )
    older = autoencoder_settings(pictures, tmp_path / "b", max_steps=2, kl_weight=0.0768, **common)
    latest = train_autoencoder(older) / "training/checkpoints/step-00000002"
    state = json.loads((latest / "state.json").read_text())
    state["format"], state["settings"]["kl_weight"] = 3, 1e-4
    before = digest_of(latest / "state.json")
    (latest / "state.json").write_text(json.dumps(state))
    sums = (latest / "SHA256SUMS").read_text().replace(before, digest_of(latest / "state.json"))
    (latest / "SHA256SUMS").write_text(sums)
    same = older.model_copy(update={"max_steps": 4, "kl_weight": 1e-4})
    with pytest.raises(ValueError, match=r"so kl_weight=0\.0768 goes on with the run as it was, and kl_weight=0\.0001"):
        train_autoencoder(same)
    train_autoencoder(same.model_copy(update={"kl_weight": 0.0768}))
    last = "training/checkpoints/step-00000004/trained.safetensors"
    one, other = load_file(straight / last), load_file(tmp_path / "b" / last)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["trained.safetensors", "averaged-0.safetensors", "optimizer.bin", "state.json"])
def test_a_truncated_checkpoint_is_named_and_the_one_before_serves(name: str, pictures: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {**VQ, "ema_decay": 0.9, "checkpoint_every": 1}
    straight = train_autoencoder(autoencoder_settings(pictures, tmp_path / "a", max_steps=3, **common))
    cut = tmp_path / "b"
    train_autoencoder(autoencoder_settings(pictures, cut, max_steps=2, **common))
    latest = cut / "training/checkpoints/step-00000002"
    content = (latest / name).read_bytes()
    (latest / name).write_bytes(content[: len(content) // 2])
    again = autoencoder_settings(pictures, cut, max_steps=3, **common)
    with pytest.raises(ValueError, match=rf"step-00000002/{name} is damaged .* goes on from step-00000001"):
        train_autoencoder(again)
    shutil.rmtree(latest)
    train_autoencoder(again)
    last = "training/checkpoints/step-00000003/trained.safetensors"
    one, other = load_file(straight / last), load_file(cut / last)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_in_bfloat16_learns_and_keeps_whole_weights(pictures: Path, tmp_path: Path) -> None:
    judged: dict[str, Any] = {"discriminator_weight": 0.1, "discriminator_start": 20, "discriminator_channels": 4}
    common: dict[str, Any] = {"max_steps": 40, "batch_size": 4, "learning_rate": 3e-3, "sample_every": 20, **VQ}
    settings = autoencoder_settings(
        pictures, tmp_path / "out", mixed_precision="bf16", discriminator_layers=1, log_every=1, **common, **judged
    )
    output = train_autoencoder(settings)
    rows = [json.loads(line) for line in (output / "training/metrics.jsonl").read_text().splitlines()]
    assert [row["psnr"] for row in rows if "psnr" in row][-1] > 10
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert any("discriminator_loss" in row for row in rows)
    weights = load_file(output / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
