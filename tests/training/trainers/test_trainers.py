"""The two trainers end to end at tiny sizes: they learn, resume exactly, and leave what a user can load."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from straight_line import Line
from straight_line import settings as line_settings
from tiny import autoencoder_settings
from trained import same, weights

from latentdiff import TextToImagePipeline, VQModel
from latentdiff.training.data import CaptionedPicture
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import DenoiserSettings
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.samples import chosen_captions, sample_captions


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoder_learns_and_diffusers_loads_it(pictures: Path, tmp_path: Path, kind: str) -> None:
    changes = {"max_steps": 80, "batch_size": 4, "learning_rate": 3e-3, "sample_every": 20, "num_vq_embeddings": 16}
    settings = autoencoder_settings(pictures, tmp_path / "out", kind=kind, **changes)
    out = train_autoencoder(settings)
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (row["psnr"] for row in rows if "psnr" in row)
    assert last > first + 0.5
    peer_class = diffusers.AutoencoderKL if kind == "kl" else diffusers.VQModel
    peer = peer_class.from_pretrained(out)
    assert same(weights(out), peer.state_dict())
    with Image.open(out / "training" / "samples" / "step-00000080.png") as grid:
        assert grid.width > 16 * 2
    encoded = peer.encode(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert (encoded.latent_dist.mean if kind == "kl" else encoded.latents).shape == (4, 4, 8, 8)
    assert peer.config.scaling_factor != diffusers.AutoencoderKL().config.scaling_factor


def test_training_pictures_are_not_called_held_out(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_autoencoder(autoencoder_settings(pictures, tmp_path / "a", max_steps=1))
    assert "figures are of training pictures" not in caplog.text
    metadata = (pictures / "metadata.jsonl").read_text(encoding="utf-8")
    rows = metadata.replace(', "split": "train"', "").replace(', "split": "validation"', "")
    (pictures / "metadata.jsonl").write_text(rows, encoding="utf-8")
    train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=1))
    assert "figures are of training pictures" in caplog.text


@pytest.mark.parametrize("accumulation", [1, 2])
def test_autoencoder_resumes_exactly(pictures: Path, tmp_path: Path, accumulation: int) -> None:
    common = {"gradient_accumulation_steps": accumulation}
    straight = train_autoencoder(autoencoder_settings(pictures, tmp_path / "a", max_steps=6, **common))
    train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=3, **common))
    resumed = train_autoencoder(autoencoder_settings(pictures, tmp_path / "b", max_steps=6, **common))
    assert same(weights(straight), weights(resumed))
    other = train_autoencoder(autoencoder_settings(pictures, tmp_path / "c", max_steps=6, seed=1, **common))
    assert not same(weights(straight), weights(other))


def test_denoiser_resumes_exactly_and_leaves_a_pipeline(denoiser_settings: dict[str, object], tmp_path: Path) -> None:
    def train(name: str, steps: int) -> Path:
        values = {**denoiser_settings, "output": str(tmp_path / name), "max_steps": steps}
        return train_denoiser(DenoiserSettings.load(None, values))

    straight = train("a", 5)
    train("b", 2)
    resumed = train("b", 5)
    assert same(weights(straight / "unet"), weights(resumed / "unet"))

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(straight)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    assert pipeline("a red thing", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)
    with Image.open(straight / "training" / "samples" / "step-00000005.png") as grid:
        # The names of the rows, and ten pictures of 16 pixels, enlarged to 64, with what was drawn of their captions,
        # which stand below.
        assert grid.size == (9 * 130 - 2, 2 * (2 * 64 + 43 + 2) - 2)


def test_half_precision_recomputation_and_buckets(denoiser_settings: dict[str, object], tmp_path: Path) -> None:
    changes = {"mixed_precision": "bf16", "gradient_checkpointing": True, "buckets": True, "crop": "random"}
    changes |= {"caption_shuffle": True, "noise_offset": 0.1, "decay_steps": 2, "decay_shape": "cosine"}
    values = {**denoiser_settings, **changes, "output": str(tmp_path / "a"), "max_steps": 4, "num_workers": 1}
    out = train_denoiser(DenoiserSettings.load(None, values))
    assert all(value.isfinite().all() for value in weights(out / "unet").values())
    assert weights(out / "unet")["conv_in.weight"].dtype == torch.float32


def test_without_the_caches_it_learns_the_same(
    denoiser_settings: dict[str, object], tmp_path: Path, shared_cache: Path
) -> None:
    def losses(name: str, **changes: object) -> list[float]:
        values = {**denoiser_settings, "output": str(tmp_path / name), "max_steps": 4, "log_every": 1, **changes}
        rows = (train_denoiser(DenoiserSettings.load(None, values)) / "training" / "metrics.jsonl").read_text()
        return [row["loss"] for row in map(json.loads, rows.splitlines()) if "loss" in row]

    cached = losses("cached")
    assert len(list(shared_cache.glob("*/*/*.safetensors"))) == 2
    shutil.rmtree(shared_cache)
    assert losses("plain", cache_latents=False, cache_text=False) == pytest.approx(cached, rel=5e-3)
    assert not shared_cache.exists()
    assert not list(tmp_path.glob("*/training/cache"))


@pytest.mark.parametrize("cached", [True, False])
def test_long_captions_are_reported_once(
    denoiser_settings: dict[str, object], tmp_path: Path, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(str(denoiser_settings["data"]))
    metadata = (data / "metadata.jsonl").read_text(encoding="utf-8")
    (data / "metadata.jsonl").write_text(metadata.replace("a red thing", "a very very red thing"), encoding="utf-8")
    values = {**denoiser_settings, "output": str(tmp_path / "a"), "max_steps": 3, "sample_prompts": ["a cup"]}
    train_denoiser(DenoiserSettings.load(None, {**values, "cache_text": cached, "caption_dropout": 0.0}))
    found = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert len(found) == 1
    assert "1 captions are longer than the text encoder's 12 tokens" in found[0]


def captioned(*captions: str) -> list[CaptionedPicture]:
    return [CaptionedPicture(f"{i}.png", bytes, (caption,)) for i, caption in enumerate(captions)]


def test_samples_show_as_many_classes_as_there_are(tmp_path: Path) -> None:
    of_two = sample_captions(captioned(*["cat"] * 40, *["dog"] * 40))  # as folders give them
    assert of_two[:2] == ["cat", "dog"]
    assert of_two.count("cat") == of_two.count("dog") == 8
    few = sample_captions(captioned(*["cat"] * 40, *["dog"] * 2))
    assert (few.count("cat"), few.count("dog")) == (14, 2)
    names = [f"class {i:03d}" for i in range(100)]
    of_many = sample_captions(captioned(*(name for name in names for _ in range(3))))
    assert len(set(of_many)) == 16
    assert (of_many[0], of_many[-1]) == ("class 000", "class 093")
    assert sample_captions(captioned("a", "b", "a")) == ["a", "b", "a"]
    assert sample_captions([]) == []


def test_captions_of_samples_are_chosen_once(tmp_path: Path) -> None:
    run = TrainingRun(line_settings(tmp_path), Line())
    assert chosen_captions(run, captioned("a", "b")) == ["a", "b"]
    run.step = 10
    assert chosen_captions(run, captioned("c")) == ["a", "b"]
    run.step = 0  # it begins anew
    assert chosen_captions(run, captioned("c")) == ["c"]


def test_a_denoiser_on_the_latents_of_a_codebook(
    denoiser_settings: dict[str, object], pictures: Path, tmp_path: Path
) -> None:
    codebook = train_autoencoder(autoencoder_settings(pictures, tmp_path / "vq", kind="vq", max_steps=2))
    values = {**denoiser_settings, "autoencoder": str(codebook), "output": str(tmp_path / "a"), "max_steps": 1}
    out = train_denoiser(DenoiserSettings.load(None, values))
    pipeline = TextToImagePipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.vae) is VQModel
    assert pipeline("a red thing", seed=0, num_inference_steps=2).images[0].size == (16, 16)


def test_other_caption_or_picture_is_encoded_anew(denoiser_settings: dict[str, object], tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def train(output: str) -> set[str]:
        values = {**denoiser_settings, "output": str(tmp_path / output), "max_steps": 1, "cache_dir": str(cache)}
        train_denoiser(DenoiserSettings.load(None, values))
        return {file.name for file in cache.rglob("*.safetensors")}

    first = train("a")
    assert len(first) == 2
    assert train("b") == first
    data = Path(str(denoiser_settings["data"]))
    Image.new("RGB", (16, 16), "black").save(data / "0.png")
    second = train("c")
    assert len(second - first) == 1
    metadata = (data / "metadata.jsonl").read_text(encoding="utf-8")
    (data / "metadata.jsonl").write_text(metadata.replace("a red thing", "a dark thing"), encoding="utf-8")
    assert len(train("d") - second) == 1


def test_settings_of_another_model_do_not_resume(pictures: Path, tmp_path: Path) -> None:
    train_autoencoder(autoencoder_settings(pictures, tmp_path / "a", max_steps=1))
    with pytest.raises(ValueError, match="the run there was begun otherwise"):
        train_autoencoder(autoencoder_settings(pictures, tmp_path / "a", max_steps=2, block_out_channels=(8, 12)))


def test_a_denoiser_goes_on_with_what_it_began_with(denoiser_settings: dict[str, object], tmp_path: Path) -> None:
    """None of these shows in the shapes of the weights."""
    out = tmp_path / "a"
    values = {**denoiser_settings, "output": str(out), "max_steps": 1}
    train_denoiser(DenoiserSettings.load(None, values))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    others = {"prediction_type": "sample", "noise_schedule": "linear", "num_train_timesteps": 500, "loss": "l1"}
    others |= {
        "attention_head_dim": 16,
        "norm_num_groups": 2,
        "zero_terminal_snr": False,
        "seed": 1,
        "optimizer": "sgd",
    }
    for key, value in others.items():
        with pytest.raises(ValueError, match=rf"begun otherwise .*\b{key} was"):
            train_denoiser(DenoiserSettings.load(None, {**values, "max_steps": 2, key: value}))
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != ".lock"} == {
        file: content for file, content in before.items() if file.name != ".lock"
    }


def test_a_denoiser_goes_on_with_the_networks_it_began_with(denoiser_settings: dict[str, Any], tmp_path: Path) -> None:
    """They may lie elsewhere; in their old places others may lie."""
    values = {**denoiser_settings, "output": str(tmp_path / "a"), "max_steps": 1}
    train_denoiser(DenoiserSettings.load(None, values))
    (tmp_path / "autoencoder").rename(tmp_path / "moved")
    moved = {**values, "autoencoder": str(tmp_path / "moved"), "max_steps": 2}
    other = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**other, "scaling_factor": 2.0}))
    with pytest.raises(ValueError, match=r"begun otherwise .another autoencoder than before.*another --output"):
        train_denoiser(DenoiserSettings.load(None, moved))
    (tmp_path / "moved" / "config.json").write_text(json.dumps(other))
    file = tmp_path / "text" / "text_encoder" / "model.safetensors"
    texts = load_file(file)
    name = next(name for name in texts if name.endswith("word_embeddings.weight"))
    save_file(
        {**texts, name: texts[name] + 1}, tmp_path / "text" / "text_encoder" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="another text encoder than before"):
        train_denoiser(DenoiserSettings.load(None, moved))
    save_file(texts, file, {"format": "pt"})
    assert (train_denoiser(DenoiserSettings.load(None, moved)) / "training/checkpoints/step-00000002").is_dir()


def test_a_model_of_another_class_is_no_autoencoder(denoiser_settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}', encoding="utf-8")
    values = {**denoiser_settings, "autoencoder": str(tmp_path), "output": str(tmp_path / "a"), "max_steps": 1}
    with pytest.raises(ValueError, match="of a UNet2DModel, not of AutoencoderKL or VQModel"):
        train_denoiser(DenoiserSettings.load(None, values))


def test_mistakes_are_explained(denoiser_settings: dict[str, object], tmp_path: Path) -> None:
    def train(**changes: object) -> None:
        values = {**denoiser_settings, "output": str(tmp_path / "x"), "max_steps": 1, **changes}
        train_denoiser(DenoiserSettings.load(None, values))

    with pytest.raises(FileNotFoundError, match="no autoencoder found"):
        train(autoencoder=str(tmp_path))
    with pytest.raises(ValueError, match="resolution 17 is not divisible"):
        train(resolution=17)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        train(prediction_type="epsilon", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="resolution 15 is not divisible by the factor 2"):
        train_autoencoder(
            autoencoder_settings(Path(str(denoiser_settings["data"])), tmp_path / "y", resolution=15, max_steps=1)
        )


def test_a_diverging_run_stops_and_says_so(pictures: Path, tmp_path: Path) -> None:
    settings = autoencoder_settings(
        pictures, tmp_path / "a", max_steps=400, learning_rate=1e12, max_grad_norm=1e12, checkpoint_every=1
    )
    with pytest.raises(FloatingPointError, match="the loss is"):
        train_autoencoder(settings)
    good = sorted((tmp_path / "a" / "training" / "checkpoints").iterdir())
    assert good
    assert all(value.isfinite().all() for value in load_file(good[-1] / "trained.safetensors").values())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_process_goes_on_to_the_same_weights(pictures: Path, tmp_path: Path, how: signal.Signals) -> None:
    def command(output: Path) -> list[str]:
        settings = ["max_steps=60", "resolution=16", "batch_size=2", "block_out_channels=[8, 16]", "norm_num_groups=4"]
        settings += ["warmup_steps=1", "checkpoint_every=5", "sample_every=1000"]
        start = [sys.executable, "-m", "latentdiff.training", "autoencoder", "--data", str(pictures)]
        return [*start, "--output", str(output), *settings]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "a"), check=True, env=environment, cwd=tmp_path)
    process = subprocess.Popen(command(tmp_path / "b"), env=environment, cwd=tmp_path, stdout=subprocess.PIPE)
    checkpoints = tmp_path / "b" / "training" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    assert process.communicate(timeout=60)[0] == b""  # nothing that claims success
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert sorted(checkpoints.glob("step-*"))[-1].name < "step-00000060"
    subprocess.run(command(tmp_path / "b"), check=True, env=environment, cwd=tmp_path)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_compiled_run_trains_the_same(kind: str, pictures: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 2, "kind": kind, "num_vq_embeddings": 16}
    runs = [
        train_autoencoder(autoencoder_settings(pictures, tmp_path / str(compiled), compile=compiled, **changes))
        for compiled in (False, True)
    ]
    eager, compiled = (weights(run) for run in runs)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=1e-3, rtol=1e-2)
