"""Every trainer on a GPU in bfloat16 and, with the scaler, in float16; from one device to the other and back."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from straight_line import Line, Points, settings
from tiny import AUTOENCODER, DENOISER, SMALL

from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.objective import Result
from latentdiff.training.settings import (
    AutoencoderSettings,
    ClassifierSettings,
    DenoiserSettings,
    DistillationSettings,
    FinetuneSettings,
    PriorSettings,
)
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.classifier import train_classifier
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.distill import distill
from latentdiff.training.trainers.finetune import finetune
from latentdiff.training.trainers.prior import train_prior

STEPS = {"max_steps": 3, "checkpoint_every": 3, "sample_every": 3, "log_every": 1, "batch_size": 2}
PIXELS = {**DENOISER, "autoencoder": "pixels", "caption_column": "colour"}
LEVELS = {"block_out_channels": (8, 16), "attention_levels": (False, True), "attention_head_dim": 8}
GAN = {"discriminator_weight": 0.5, "discriminator_start": 1, "discriminator_channels": 4, "discriminator_layers": 1}
PRIOR = {**SMALL, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "autoencoder": "vq"}
BLOCKS = {**SMALL, "sample_steps": 2, "network": "dit", "network_options": {"depth": 2, "width": 24, "heads": 2}}
CHECKPOINTED = {"gradient_checkpointing": True}
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "text": (train_denoiser, DenoiserSettings, {**DENOISER, **CHECKPOINTED}),
    "text, uncached": (train_denoiser, DenoiserSettings, {**DENOISER, "cache_latents": False, "cache_text": False}),
    "flow": (train_denoiser, DenoiserSettings, {**DENOISER, "objective": "flow"}),
    "dit": (train_denoiser, DenoiserSettings, {**BLOCKS, **CHECKPOINTED}),
    "dit of classes": (
        train_denoiser,
        DenoiserSettings,
        {**BLOCKS, "condition": "class", "caption_column": "colour", "text_encoder": None},
    ),
    "raster": (train_prior, PriorSettings, {**PRIOR, "order": "raster"}),
    "masked": (train_prior, PriorSettings, {**PRIOR, "order": "masked"}),
    "class": (train_denoiser, DenoiserSettings, {**PIXELS, "condition": "class", "loss": "hybrid"}),
    "nothing": (
        train_denoiser,
        DenoiserSettings,
        {**PIXELS, "condition": "none", "timestep_sampler": "loss_second_moment"},
    ),
    "kl": (train_autoencoder, AutoencoderSettings, {**AUTOENCODER, **GAN, **CHECKPOINTED}),
    "vq": (train_autoencoder, AutoencoderSettings, {**AUTOENCODER, "kind": "vq", "num_vq_embeddings": 16}),
    "gumbel": (train_autoencoder, AutoencoderSettings, {**AUTOENCODER, "kind": "gumbel", "num_vq_embeddings": 16}),
    "fsq": (train_autoencoder, AutoencoderSettings, {**AUTOENCODER, "kind": "fsq"}),
    "tiny": (
        train_autoencoder,
        AutoencoderSettings,
        {**AUTOENCODER, "kind": "tiny", "block_out_channels": (8, 8), "layers_per_block": 1, "teacher": "model"},
    ),
    "classifier": (
        train_classifier,
        ClassifierSettings,
        {**LEVELS, "norm_num_groups": 4, "caption_column": "colour", "model": "class"},
    ),
    "full": (finetune, FinetuneSettings, {"method": "full", "train_text_encoder": True, **CHECKPOINTED}),
    "lora": (finetune, FinetuneSettings, {"method": "lora", "lora_rank": 2, "train_text_encoder": True}),
    "sdxl": (finetune, FinetuneSettings, {"method": "lora", "lora_rank": 2, "sample_steps": 2, **CHECKPOINTED}),
    "dreambooth": (
        finetune,
        FinetuneSettings,
        {"method": "dreambooth", "caption": "a red cup", "class_prompt": "a cup", "class_pictures": 3},
    ),
    "word": (
        finetune,
        FinetuneSettings,
        {"method": "textual-inversion", "placeholder_token": "<my-cup>", "initializer_token": "cup"},
    ),
    "lcm": (distill, DistillationSettings, {"method": "lcm", "lora_rank": 2, "target_decay": 0.5}),
    "trajectory": (distill, DistillationSettings, {"method": "trajectory", **CHECKPOINTED}),
    "consistency": (distill, DistillationSettings, {"method": "consistency", **CHECKPOINTED}),
    "progressive": (distill, DistillationSettings, {"method": "progressive", "start_steps": 4, "stage_steps": 1}),
    "adversarial": (
        distill,
        DistillationSettings,
        {"method": "adversarial", "discriminator_channels": 4, "r1_weight": 0.1},
    ),
    "dmd": (distill, DistillationSettings, {"method": "dmd", "lora_rank": 2}),
}
USUAL = {"sdxl": "sdxl", "full": "bert", "dreambooth": "bert", "word": "bert", "lora": "bert"}


def train(name: str, place: Path, output: Path, **changes: Any) -> Path:
    trainer, kind, given = TRAINERS[name]
    values: dict[str, Any] = {**given, **STEPS, "data": str(place / "pictures"), "output": str(output), **changes}
    if kind in (DenoiserSettings, PriorSettings):
        values = {"autoencoder": "autoencoder", "text_encoder": str(place / "text"), **values}
        if values["autoencoder"] != "pixels":
            values["autoencoder"] = str(place / values["autoencoder"])
    if name == "classifier":
        values["model"] = str(train("class", place, output.parent / "class"))
    elif kind in (FinetuneSettings, DistillationSettings):
        values["model"] = str(place / USUAL.get(name, "model"))
    elif "teacher" in values:
        values["teacher"] = str(place / "model")
    if name == "dreambooth" or name == "word":
        values["data"] = str(without_captions(Path(values["data"]), output.parent))
    return trainer(kind.load(None, values))


def without_captions(pictures: Path, folder: Path) -> Path:
    bare = folder / "bare"
    if not bare.exists():
        bare.mkdir()
        for file in pictures.glob("*.png"):
            (bare / file.name).write_bytes(file.read_bytes())
    return bare


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "training" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def check(output: Path, steps: int = 3) -> None:
    found = losses(output)
    assert set(found) == set(range(1, steps + 1))
    assert all(math.isfinite(loss) for loss in found.values())
    files = list(output.rglob("*.safetensors"))
    assert files
    for file in files:
        assert all(tensor.isfinite().all() for tensor in load_file(file).values() if tensor.is_floating_point()), file


@pytest.fixture(autouse=True)
def no_memory_of_other_runs() -> Any:
    yield
    reset()


def reset() -> None:
    """Let Accelerate choose its device anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer(name: str, precision: str, place: Path, tmp_path: Path, device: torch.device) -> None:
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("processors do not train in float16")
    check(train(name, place, tmp_path / "out", mixed_precision=precision))


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor"])
def test_small_optimizers(optimizer: str, place: Path, tmp_path: Path, device: torch.device) -> None:
    if optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    check(train("full", place, tmp_path / "out", optimizer=optimizer, mixed_precision="bf16"))


def test_a_compiled_denoiser_learns(place: Path, tmp_path: Path, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("takes a minute on a processor")
    plain = train("text", place, tmp_path / "plain", mixed_precision="bf16", gradient_checkpointing=False)
    output = train("text", place, tmp_path / "out", mixed_precision="bf16", compile=True, gradient_checkpointing=False)
    check(output)
    for step, loss in losses(plain).items():
        assert losses(output)[step] == pytest.approx(loss, rel=0.05)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_moves_from_one_device_to_the_other_and_back(
    precision: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The draws depend on seed and step alone, so that the losses are those of a run on the processor."""
    used = []
    for on_cpu, until in ((True, 2), (device.type == "cpu", 4), (True, 6)):
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(on_cpu).lower())
        reset()
        changes: dict[str, Any] = {"mixed_precision": precision, "max_steps": until, "checkpoint_every": 2}
        output = train("text", place, tmp_path / "moved", **changes)
        used.append(PartialState().device.type)
    assert used == ["cpu", device.type, "cpu"]
    reset()
    stayed = train("text", place, tmp_path / "stayed", mixed_precision=precision, max_steps=6)
    check(output, 6)
    far = 0.01 if precision == "no" else 0.05
    for step, loss in losses(stayed).items():
        assert losses(output)[step] == pytest.approx(loss, rel=far)


class Greedy(Line):
    def training_loss(self, batch: Points) -> Result:
        raise AssertionError(torch.ones(2**48, device=self.slope.device).sum())


def test_a_training_that_does_not_fit_is_explained(tmp_path: Path, device: torch.device) -> None:
    run = TrainingRun(settings(tmp_path), Greedy())
    with pytest.raises(RuntimeError, match="memory") as caught:
        run.learner.learn(Points(torch.randn(4, 2)), 0)
    assert run.device.type == device.type
    assert any("gradient_checkpointing=true" in note for note in caught.value.__notes__)
