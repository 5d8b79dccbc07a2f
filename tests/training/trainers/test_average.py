"""`latentdiff average` for every trainer: its model has the averages, draws, and has a card of its own; or why not."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from straight_line import Line, go
from straight_line import settings as line_settings
from tiny import DENOISER, SMALL, UNET, autoencoder_settings, tiny_pipeline

from latentdiff.models import UNet2DConditionModel
from latentdiff.pipelines import ClassConditionalPipeline, ClassTokenPipeline, TextToImagePipeline
from latentdiff.training.card.card import describe
from latentdiff.training.card.kinds import autoencoder_kind
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import (
    ClassifierSettings,
    DenoiserSettings,
    DistillationSettings,
    FinetuneSettings,
    PriorSettings,
)
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.average import average
from latentdiff.training.trainers.classifier import train_classifier
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.distill import distill
from latentdiff.training.trainers.finetune import finetune
from latentdiff.training.trainers.prior import train_prior

STEPS = {"max_steps": 4, "learning_rate": 1e-2, "ema_snapshots": 2, "ema_decay": 0.0}
COLOURS = {"condition": "class", "caption_column": "colour"}
DIT_HAS_NOT = ("block_out_channels", "attention_levels", "attention_head_dim", "norm_num_groups")
DIT = {key: value for key, value in DENOISER.items() if key not in DIT_HAS_NOT}
DIT |= {"network": "dit", "network_options": {"depth": 1, "width": 24, "heads": 2}}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def an_autoencoder(data: Path, out: Path, **changes: Any) -> Path:
    return train_autoencoder(autoencoder_settings(data, out, **{**STEPS, "sample_every": 4, **changes}))


def a_denoiser(data: Path, out: Path, **changes: Any) -> Path:
    values = {**(DIT if "network" in changes else DENOISER), **COLOURS, "autoencoder": "pixels", **STEPS, **changes}
    return train_denoiser(DenoiserSettings.load(None, {**values, "data": str(data), "output": str(out)}))


def a_classifier(data: Path, out: Path) -> Path:
    model = a_denoiser(data, out.with_name("model"), ema_snapshots=0, max_steps=1)
    small = {key: DENOISER[key] for key in ("batch_size", "warmup_steps", "sample_steps", "norm_num_groups")}
    small |= {key: DENOISER[key] for key in ("block_out_channels", "attention_levels", "attention_head_dim")}
    values = {**small, **STEPS, "caption_column": "colour", "data": str(data), "model": str(model)}
    return train_classifier(ClassifierSettings.load(None, {**values, "output": str(out)}))


def a_prior(data: Path, out: Path) -> Path:
    vq = an_autoencoder(data, out.with_name("vq"), kind="vq", num_vq_embeddings=16, ema_snapshots=0, max_steps=1)
    values = {**SMALL, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, **COLOURS, **STEPS}
    return train_prior(
        PriorSettings.load(None, {**values, "data": str(data), "autoencoder": str(vq), "output": str(out)})
    )


def of_a_model(
    train: Callable[[Any], Path], settings: Any, data: Path, out: Path, text: str = "clip", **changes: Any
) -> Path:
    model = out.with_name("model")
    tiny_pipeline(text).save_pretrained(model)
    small = {"batch_size": 2, "sample_every": 4, "sample_steps": 2, **STEPS}
    values = {**small, "data": str(data), "model": str(model), "output": str(out), **changes}
    return train(settings.load(None, values))


def a_finetuning(data: Path, out: Path, **changes: Any) -> Path:
    return of_a_model(finetune, FinetuneSettings, data, out, **{"method": "full", **changes})


def a_distillation(data: Path, out: Path, **changes: Any) -> Path:
    return of_a_model(distill, DistillationSettings, data, out, **changes)


TABLE: dict[str, tuple[Callable[..., Path], dict[str, Any], dict[str, str]]] = {
    "kl": (an_autoencoder, {"discriminator_weight": 0.5}, {"autoencoder": ""}),
    "vq": (an_autoencoder, {"kind": "vq", "num_vq_embeddings": 16}, {"autoencoder": ""}),
    "denoiser": (a_denoiser, {}, {"denoiser": "unet"}),
    "dit": (a_denoiser, {"network": "dit"}, {"denoiser": "transformer"}),
    "classifier": (a_classifier, {}, {"classifier": "classifier"}),
    "prior": (a_prior, {}, {"transformer": "transformer"}),
    "finetune": (a_finetuning, {}, {"denoiser": "unet"}),
    "finetune with its text encoder": (
        a_finetuning,
        {"train_text_encoder": True, "cache_text": False},
        {"denoiser": "unet", "text_encoder": "text_encoder"},
    ),
    "dreambooth": (
        a_finetuning,
        {"method": "dreambooth", "caption": "a red cup", "class_prompt": "a cup", "class_pictures": 2},
        {"denoiser": "unet"},
    ),
    "lcm": (a_distillation, {}, {"student": "unet"}),
    "progressive": (
        a_distillation,
        {"method": "progressive", "start_steps": 8, "stage_steps": 2, "max_steps": 6},
        {"student": "unet"},
    ),
    "dmd": (a_distillation, {"method": "dmd"}, {"student": "unet"}),
}
"""What trains, with what, and in which folder of the model each of its networks is."""


def draw(folder: Path) -> torch.Tensor | None:
    """A picture of the model in it; None of an autoencoder."""
    if not (folder / "model_index.json").exists():
        return None
    text = (folder / "text_encoder").exists()
    kinds = (ClassConditionalPipeline, ClassTokenPipeline)
    kind = TextToImagePipeline if text else kinds["Token" in (folder / "model_index.json").read_text()]
    pipeline: Any = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    few = {} if kind is ClassTokenPipeline else {"num_inference_steps": 2}
    few |= {"classifier_scale": 2.0} if (folder / "classifier").exists() else {}
    images: torch.Tensor = pipeline("a red cup" if text else "red", seed=0, output_type="pt", **few).images
    return images


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_a_run_of_every_trainer_is_averaged(name: str, labelled: Path, tmp_path: Path) -> None:
    train, changes, networks = TABLE[name]
    run = train(labelled, tmp_path / "run", **changes)
    average(run, 0.1, tmp_path / "new")
    last = sorted((run / "training" / "averages").glob("*-0.1.safetensors"))[-1]
    kept, moved = load_file(last), 0.0
    assert {key.partition(".")[0] for key in kept} == set(networks)
    for network, folder in networks.items():
        file = Path(folder, "model.safetensors" if network == "text_encoder" else WEIGHTS)
        found, trained = load_file(tmp_path / "new" / file), load_file(run / file)
        assert found.keys() == trained.keys()
        for key, tensor in kept.items():
            of, _, own = key.partition(".")
            if of == network:
                torch.testing.assert_close(found[own], tensor, atol=1e-5, rtol=1e-4)
                moved = max(moved, float((found[own] - trained[own]).abs().max()))
    assert moved > 1e-3
    images = draw(tmp_path / "new")
    assert images is None or (images.isfinite().all() and not torch.equal(images, draw(run)))
    card, own = ((folder / "README.md").read_text() for folder in (tmp_path / "new", run))
    steps = changes.get("max_steps", 4)
    assert f"in {steps} optimizer steps. Its weights are an average over 0.1 of the first {steps} of these" in card
    assert card.partition("## Settings")[2] == own.partition("## Settings")[2]
    assert 'from_pretrained("new")' in card


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (FinetuneSettings, {"method": "lora"}),
        (FinetuneSettings, {"method": "dreambooth", "caption": "a", "lora_rank": 2}),
        (FinetuneSettings, {"method": "textual-inversion", "placeholder_token": "<x>"}),
        (DistillationSettings, {"model": "emoji", "lora_rank": 2}),
    ],
)
def test_adapters_have_no_snapshots(settings: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ema_snapshots are for whole networks; for adapters and words take ema_decay"):
        settings.load(None, {"data": "d", "output": "o", "ema_snapshots": 5, **changes})


def test_a_network_in_several_files_is_averaged(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**UNET)
    unet.save_pretrained(tmp_path / "run" / "unet", max_shard_size="20KB")
    files = sorted((tmp_path / "run" / "unet").glob("*.safetensors"))
    assert len(files) > 1
    (tmp_path / "run" / "model_index.json").write_text("{}")
    (tmp_path / "run" / "training" / "averages").mkdir(parents=True)
    doubled = {f"denoiser.{name}": 2 * tensor for name, tensor in unet.state_dict().items()}
    kept = tmp_path / "run" / "training" / "averages" / "step-00000002-0.1.safetensors"
    save_file(doubled, kept, {"updates": "2", "length": "0.1"})
    average(tmp_path / "run", 0.1, tmp_path / "new")
    new = UNet2DConditionModel.from_pretrained(tmp_path / "new" / "unet")
    for name, tensor in new.state_dict().items():
        torch.testing.assert_close(tensor, doubled[f"denoiser.{name}"])


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A run with a card, whose weights are one number; its user has written into the card."""
    run = TrainingRun(line_settings(tmp_path / "run", ema_snapshots=2, max_steps=4, push_to_hub=None), Line())
    go(run)
    save_file({"slope": torch.zeros_like(run.objective.slope)}, tmp_path / "run" / WEIGHTS)
    (tmp_path / "run" / "config.json").write_text("{}")
    for file in (tmp_path / "run" / "training" / "averages").iterdir():
        named = {f"line.{name}": tensor for name, tensor in load_file(file).items()}
        save_file(named, file, {"updates": str(int(file.name[5:13])), "length": file.stem.rpartition("-")[2]})
    describe(run, autoencoder_kind("kl"), pictures=3)
    card = tmp_path / "run" / "README.md"
    card.write_text(f"{card.read_text()}\n# Mine\n\n## Figures of training\n\n| a |\n\nin 4 optimizer steps.\n")
    return tmp_path / "run"


def test_the_card_of_an_average_is_made_of_what_was_kept(described: Path, tmp_path: Path) -> None:
    average(described, 0.1, tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    ours, _, mine = card.partition("<!-- latentdiff: end of model -->")
    assert mine.strip() == "# Mine\n\n## Figures of training\n\n| a |\n\nin 4 optimizer steps."
    assert "Its weights are an average over 0.1 of the first 4 of these steps" in ours
    assert ours.count('from_pretrained("new")') == 1
    assert "## Figures" not in ours


def test_a_run_whose_card_was_made_of_what_was_not_kept(
    described: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = described / "training" / "card.json"
    kept.write_text(json.dumps({"kind": {"name": 1}}))
    with pytest.raises(ValueError, match=r"card\.json: "):
        average(described, 0.1, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    kept.unlink()
    with caplog.at_level(logging.WARNING):
        average(described, 0.1, tmp_path / "new")
    assert "card.json is missing" in caplog.text
    card = (tmp_path / "new" / "README.md").read_text()
    assert "The weights of a run, averaged over 0.1 of the first 4 of these steps" in card
    assert "from_pretrained" not in card
    assert "# Mine" in card
