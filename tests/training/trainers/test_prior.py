"""Priors over codes: trained, gone on with, saved, drawn from and evaluated."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import SMALL, autoencoder_settings
from tiny_clip import save_clip

from latentdiff import TokenPipeline
from latentdiff.cli import application
from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.tokens import MaskedOrder, RasterOrder
from latentdiff.interchange.png import read_settings
from latentdiff.models import TokenTransformer
from latentdiff.pipelines import ClassTokenPipeline, UnconditionalTokenPipeline
from latentdiff.training.batch.batch_types import DiffusionBatch
from latentdiff.training.objectives.tokens import TokenObjective
from latentdiff.training.settings import PriorSettings
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.prior import train_prior

PRIOR = {**SMALL, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "max_steps": 4, "sample_every": 2}


@pytest.fixture
def vq(pictures: Path, tmp_path: Path) -> Path:
    more = {"kind": "vq", "num_vq_embeddings": 16, "max_steps": 2}
    return train_autoencoder(autoencoder_settings(pictures, tmp_path / "vq", **more))


def settings(data: Path, vq: Path, output: Path, **changes: Any) -> PriorSettings:
    return PriorSettings.load(
        None, {**PRIOR, "data": str(data), "autoencoder": str(vq), "output": str(output), **changes}
    )


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("order", ["raster", "masked"])
def test_a_prior_goes_all_the_way(
    order: str, pictures: Path, vq: Path, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drawing, again = tmp_path / "prior", tmp_path / "a.png", tmp_path / "b.png"
    given = [f"{key}={value}" for key, value in PRIOR.items()] + [f"order={order}", f"text_encoder={text_encoder}"]
    run = application()
    places = ["--data", str(pictures), "--autoencoder", str(vq), "--output", str(out)]
    run(["train", "prior", *places, *given], standalone_mode=False)
    measured = [row for row in rows(out) if "val_loss" in row]
    assert measured
    assert ("val_bits_per_dim" in measured[0]) == (order == "raster")
    assert list((out / "training/samples").glob("*.png"))
    assert "TokenPipeline.from_pretrained" in (out / "README.md").read_text()
    more = ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "7", "--seed", "3"]
    run(["generate", "a red thing", "--model", str(out), "-o", str(drawing), *more], standalone_mode=False)
    run(["replay", str(drawing), "-o", str(again)], standalone_mode=False)
    assert drawing.read_bytes() == again.read_bytes()
    with Image.open(drawing) as picture:
        assert picture.size == (16, 16)
    pipeline = TokenPipeline.from_pretrained(out)
    assert pipeline.scheduler.name == order
    assert pipeline.transformer.config.autoencoder_digest


@pytest.mark.parametrize("order", ["raster", "masked"])
def test_going_on_is_as_if_it_had_not_stopped(order: str, pictures: Path, vq: Path, tmp_path: Path) -> None:
    def train(name: str, steps: int) -> Path:
        return train_prior(settings(pictures, vq, tmp_path / name, condition="none", order=order, max_steps=steps))

    straight = train("a", 4)
    train("b", 2)
    resumed = train("b", 4)
    file = "transformer/diffusion_pytorch_model.safetensors"
    one, other = load_file(straight / file), load_file(resumed / file)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    pipeline = UnconditionalTokenPipeline.from_pretrained(resumed)
    assert pipeline(2, seed=0, output_type="pt").images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("cached", [True, False])
def test_classes(cached: bool, labelled: Path, vq: Path, tmp_path: Path) -> None:
    given = settings(labelled, vq, tmp_path / "out", condition="class", caption_column="colour", cache_latents=cached)
    pipeline = ClassTokenPipeline.from_pretrained(train_prior(given))
    assert pipeline.num_classes == 6
    assert pipeline("red", seed=0, output_type="pt").images.shape == (1, 3, 16, 16)
    assert any("val_accuracy" in row for row in rows(tmp_path / "out"))


def batch(codes: torch.Tensor, noise: torch.Tensor, draws: list[float]) -> DiffusionBatch:
    return DiffusionBatch(
        codes[:, None].float(), noise, torch.tensor(draws, dtype=torch.float64), Conditioning(), torch.ones(len(codes))
    )


def test_the_loss_is_of_what_is_hidden() -> None:
    network = TokenTransformer(9, 2, order="masked", num_layers=1, num_attention_heads=1, attention_head_dim=8)
    torch.nn.init.normal_(network.head.weight)
    codes, noise = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[[0.1, 3.0], [-1.0, 0.5]]]])
    given = batch(codes, noise, [0.3])  # the sine of 27 degrees, 0.454: two of four
    loss = TokenObjective(network, MaskedOrder()).training_loss(given).loss
    seen = torch.tensor([[[1, 9], [3, 9]]])
    logits = network(seen).log_softmax(1)
    torch.testing.assert_close(loss, -(logits[0, 2, 0, 1] + logits[0, 4, 1, 1]) / 2)


def test_bits_are_of_all_codes() -> None:
    network = TokenTransformer(8, 2, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    torch.nn.init.zeros_(network.head.weight)  # all codes are as likely: 3 bits each
    given = batch(torch.tensor([[[1, 2], [3, 4]]]), torch.zeros(1, 1, 2, 2), [0.5])
    figures = TokenObjective(network, RasterOrder(), values=3 * 4**2).held_out_loss(given).figures
    assert figures["val_bits_per_dim"].item() == pytest.approx(3 / 48)


def test_what_cannot_be_trained_is_refused(pictures: Path, vq: Path, tmp_path: Path) -> None:
    kl = train_autoencoder(autoencoder_settings(pictures, tmp_path / "kl", max_steps=1))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="kl: a AutoencoderKL has no codes; take an autoencoder of kind=vq"):
        train_prior(settings(pictures, kl, out, condition="none"))
    with pytest.raises(ValueError, match="buckets=true is not for a prior"):
        settings(pictures, vq, out, buckets=True)
    with pytest.raises(ValueError, match="sample_steps is for order=masked"):
        settings(pictures, vq, out, order="raster", sample_steps=8)
    with pytest.raises(ValueError, match="min_snr_gamma"):
        settings(pictures, vq, out, min_snr_gamma=5.0)
    assert not out.exists()
    train_prior(settings(pictures, vq, out, condition="none", max_steps=2))
    other = train_autoencoder(
        autoencoder_settings(pictures, tmp_path / "other", kind="vq", num_vq_embeddings=16, max_steps=2, seed=1)
    )
    with pytest.raises(ValueError, match="autoencoder"):
        train_prior(settings(pictures, other, out, condition="none", max_steps=6))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["raster", "masked"])
def test_it_learns_what_a_class_looks_like(order: str, labelled: Path, tmp_path: Path) -> None:
    more = {"kind": "vq", "num_vq_embeddings": 32, "max_steps": 300, "batch_size": 8, "resolution": 16}
    vq = train_autoencoder(
        autoencoder_settings(labelled, tmp_path / "vq", **more, sample_every=300, learning_rate=2e-3)
    )
    more = {"max_steps": 300, "batch_size": 8, "learning_rate": 2e-3, "ema_decay": 0.95, "sample_every": 300}
    given = settings(
        labelled,
        vq,
        tmp_path / "out",
        condition="class",
        caption_column="colour",
        order=order,
        random_flip=False,
        **more,
    )
    pipeline = ClassTokenPipeline.from_pretrained(train_prior(given))
    red, blue = (pipeline([name] * 4, seed=0, output_type="pt").images.mean((0, 2, 3)) for name in ("red", "blue"))
    assert red[0] - red[2] > 0.1
    assert blue[2] - blue[0] > 0.1


@pytest.mark.slow
def test_the_commands_of_the_documentation(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand there, but for sizes; then what else a model of codes is asked for in a shell."""
    page = (Path(__file__).parents[3] / "docs/tokens.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.split("```sh\n")[1].split("```")[0].splitlines()]
    assert [command[1] for command in commands] == ["train", "train", "generate"]
    small = ["resolution=16", "batch_size=2", "max_steps=2"]
    sizes = [[*small, "block_out_channels=[8,8,16]"], [*small, "num_layers=1", "num_attention_heads=2"], []]
    monkeypatch.chdir(tmp_path)
    app = application()
    for command, size in zip(commands, sizes, strict=True):
        app([*command[1:], *size], standalone_mode=False)
    with Image.open("car.png") as picture:
        assert picture.size == (16, 16)

    def run(*arguments: str) -> str:
        capsys.readouterr()
        app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    model = ("--model", "runs/words")
    clip = str(save_clip(tmp_path / "clip"))
    said = run("generate", "a red thing", *model, "--candidates", "4", "--clip", clip, "--seed", "1", "-o", "best.png")
    scores = (read_settings(Path("best.png")) or {})["scores"]
    assert f"CLIP score {scores[0]:.1f}" in said
    run("replay", "best.png", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("best.png").read_bytes()
    run("generate", "a red thing", *model, "--steps", "10", "--filmstrip", "strip.png", "-o", "watched.png")
    Path("prompts.txt").write_text("a red thing\na blue thing\n")
    run("many", "prompts.txt", *model, "-o", "many", "--top-p", "0.9")
    assert len(list(Path("many").glob("*.png"))) == 2
    run("evaluate", "runs/words", "--data", "pictures", "--count", "2", "--extractor", "autoencoder", "--output", "out")
    report = json.loads(Path("out/evaluation.json").read_text(encoding="utf-8"))
    assert report["drawn"]["num_inference_steps"] == 12
    assert all(math.isfinite(value) for value in report["metrics"].values())
