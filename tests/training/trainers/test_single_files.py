"""A model in a single file is taken wherever its folder is: by fine-tuning, evaluation and the doctor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import draw, tiny_pipeline
from typer.testing import CliRunner

from latentdiff import TextToImagePipeline, UnconditionalPipeline
from latentdiff.cli import application
from latentdiff.models import UNet2DModel
from latentdiff.pipelines.storage.places import find_place, text_encoder_at
from latentdiff.training.evaluation.held_out import load_textless, trained_without
from latentdiff.training.settings import EvaluationSettings, FinetuneSettings
from latentdiff.training.settings.learning import HELD_OUT_SHARE
from latentdiff.training.starting_networks import load_autoencoder
from latentdiff.training.trainers.finetune import finetune, load_model


def same(ours: Any, theirs: Any) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture(params=["bert", "clip"])  # a layout of our own, and Stable Diffusion's
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_pipeline(request.param).save_single_file(tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_it_is_opened_as_it_is(file: Path) -> None:
    expected, found = TextToImagePipeline.from_single_file(file), load_model(str(file))
    assert torch.equal(draw(found), draw(expected))
    assert same(load_autoencoder(str(file)), expected.vae)
    tokenizer, text_encoder = text_encoder_at(str(file))
    assert tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert tokenizer.model_max_length == expected.tokenizer.model_max_length
    assert same(text_encoder, expected.text_encoder)
    assert trained_without(str(file)) == HELD_OUT_SHARE
    assert find_place(str(file)) == file


def test_fine_tuning_begins_with_it(file: Path, pictures: Path, tmp_path: Path) -> None:
    before, folder = file.read_bytes(), tmp_path / "folder"
    TextToImagePipeline.from_single_file(file).save_pretrained(folder)
    small: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "lora_rank": 2, "sample_every": 5, "data": str(pictures)}
    weights = [
        load_file(
            finetune(FinetuneSettings.load(None, {**small, "model": str(model), "output": str(tmp_path / name)}))
            / "unet"
            / "diffusion_pytorch_model.safetensors"
        )
        for name, model in (("a", file), ("b", folder))
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert file.read_bytes() == before


def test_the_doctor_looks_at_it(file: Path, pictures: Path, tmp_path: Path) -> None:
    sheet = ["--sheet", str(tmp_path / "sheet.png")]
    said = CliRunner().invoke(application(), ["doctor", str(pictures), "--model", str(file), *sheet]).output
    assert "Originals, reconstructions and their differences: " in said
    assert (tmp_path / "sheet.png").is_file()


def test_a_model_without_text(tmp_path: Path) -> None:
    whole, file = tiny_pipeline(), tmp_path / "any.safetensors"
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4, layers_per_block=1, **blocks)
    UnconditionalPipeline(unet, whole.scheduler, whole.vae).save_single_file(file)
    assert same(load_textless(str(file)).unet, unet)
    assert same(load_autoencoder(str(file)), whole.vae)
    whole.save_single_file(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="is no model without text"):
        load_textless(str(tmp_path / "text.safetensors"))


def test_the_figures_of_an_evaluation_need_a_place(file: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny\.safetensors is no folder of yours; say with --output"):
        EvaluationSettings(model=str(file), data=str(pictures)).folder()


def test_what_could_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.ckpt").write_bytes(b"x")
    for take in (load_model, load_textless, load_autoencoder, find_place):
        with pytest.raises(ValueError, match=r"one\.ckpt: only \.safetensors files .*'latentdiff convert"):
            take(str(tmp_path / "one.ckpt"))
