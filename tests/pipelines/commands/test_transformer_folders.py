"""``models``, ``doctor`` and ``convert`` of models whose denoiser is a transformer."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from discs import save_discs
from PIL import Image
from released_dit import inputs, weights
from safetensors.torch import load_file, save_file
from tiny_codes import save_codes
from tiny_transformers import dit_folder, pixart_folder

from latentdiff import ClassConditionalPipeline, VQModel
from latentdiff.models import DiTTransformer2DModel
from latentdiff.pipelines.commands.models import model_shape

Run = Callable[..., int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    dit_folder(folder / "dit")
    pixart_folder(folder / "pixart", "bert")
    return folder


def test_they_are_listed_with_their_resolution(models: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", str(models)) == 0
    said = capsys.readouterr().out
    assert "dit: DiTPipeline, " in said
    assert "pixart: PixArtTextToImagePipeline, " in said
    assert said.count(" kB, 16 x 16 pixels\n") == 2
    assert model_shape(models / "pixart") == (16, 4)  # two pixels to a latent, patches of two latents


def test_a_network_alone_is_taken_out(models: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", str(models / "pixart"), "alone", "--component", "transformer") == 0
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(models / "pixart" / "transformer" / name), load_file(f"alone/{name}")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert run("convert", "alone", "half", "--dtype", "float16") == 0
    assert {tensor.dtype for tensor in load_file(f"half/{name}").values()} == {torch.float16}
    assert run("convert", str(models / "pixart"), "none", "--component", "unet") == 2
    assert "has no unet; it has " in capsys.readouterr().err
    assert run("convert", "alone", "alone.safetensors") == 2
    assert "a transformer alone is written as a folder" in capsys.readouterr().err
    assert not Path("none").exists()


def test_the_autoencoder_of_codes_is_taken_out(tmp_path: Path, run: Run) -> None:
    save_codes(tmp_path)
    assert run("convert", str(tmp_path / "words"), "alone", "--component", "vae") == 0
    before, after = VQModel.from_pretrained(tmp_path / "words" / "vqvae"), VQModel.from_pretrained("alone")
    assert all(torch.equal(one, after.state_dict()[name]) for name, one in before.state_dict().items())


def test_a_released_checkpoint_becomes_a_network_or_a_pipeline(
    models: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    released = {name: tensor.contiguous() for name, tensor in weights().items()}
    save_file(released, "dit.safetensors")
    others = {name: tensor + 1 for name, tensor in released.items()}
    torch.save({"model": others, "ema": released, "opt": {}, "args": argparse.Namespace(model="DiT")}, "dit.pt")
    assert run("convert", "dit.safetensors", "network") == 0
    assert run("convert", "dit.pt", "no") == 2
    assert "dit.pt is a pickle, which is only read if asked for" in capsys.readouterr().err
    assert run("convert", "dit.pt", "whole", "--ckpt", "--vae", str(models / "dit")) == 0
    networks = [DiTTransformer2DModel.from_pretrained(one) for one in ("network", "whole/transformer")]
    wanted = DiTTransformer2DModel.from_single_file("dit.safetensors")(*inputs()).sample
    assert all(torch.equal(one(*inputs()).sample, wanted) for one in networks)
    pipeline: Any = ClassConditionalPipeline.from_pretrained("whole")
    assert pipeline([3], num_inference_steps=2, seed=0, output_type="pt").images.shape == (1, 3, 16, 16)
    assert type(diffusers.DiffusionPipeline.from_pretrained("whole")) is diffusers.DiTPipeline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dit.safetensors", "out", "--vae", "nothing"], "nothing: no such folder"),
        (["dit.safetensors", "out", "--vae", "dit/transformer"], "dit/transformer holds no autoencoder"),
        (["dit.safetensors", "out", "--tokenizer", "x"], "--tokenizer does nothing for the transformer alone"),
        (["dit", "out", "--vae", "dit"], "--vae does nothing for"),
        (["code.pt", "out", "--ckpt"], "code.pt holds more than tensors, which could run code"),
        (["part.safetensors", "out"], "3 weights of the DiT are missing"),
        (["dit", "out", "--to", "onnx"], "a DiTPipeline cannot be exported to ONNX"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    models: Path, run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "onnx" in arguments:
        pytest.importorskip("onnxruntime")  # asked for first
        pytest.importorskip("onnxscript")
    Path("dit").symlink_to(models / "dit")
    released = {name: tensor.contiguous() for name, tensor in weights().items()}
    save_file(released, "dit.safetensors")
    save_file({key: value for key, value in released.items() if key != "blocks.1.attn.qkv.weight"}, "part.safetensors")
    torch.save({"ema": released, "model": weights}, "code.pt")
    assert run("convert", *arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not Path("out").exists()


@pytest.mark.slow  # graphs are made
@pytest.mark.parametrize(("kind", "what"), [("dit", ("--class", "item 3")), ("pixart", ("a red thing",))])
def test_graphs_are_put_into_a_folder_and_drawn_with(
    models: Path, run: Run, capsys: pytest.CaptureFixture[str], kind: str, what: tuple[str, ...]
) -> None:
    pytest.importorskip("openvino")
    assert run("convert", str(models / kind), "made", "--runtime", "openvino") == 0
    assert [one.name.split("-")[0] for one in Path("made/runtimes").iterdir()] == ["openvino"]
    capsys.readouterr()
    call = ("generate", *what, "--steps", "2", "--seed", "0", "-o")
    assert run(*call, "plain.png", "--model", str(models / kind)) == 0
    assert run(*call, "graph.png", "--model", "made", "--runtime", "openvino") == 0
    assert "Making graphs" not in capsys.readouterr().err
    pixels = [np.asarray(Image.open(file), dtype=int) for file in ("plain.png", "graph.png")]
    assert abs(pixels[0] - pixels[1]).max() <= 1
    assert run("replay", "graph.png", "-o", "again.png") == 0
    assert "graph.png: equal" in capsys.readouterr().out


def test_a_lora_of_a_dit_is_drawn_with_and_replayed(models: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    save_file({f"{name}A.weight": torch.randn(2, 24), f"{name}B.weight": torch.randn(24, 2)}, "lora.safetensors")
    call = ("generate", "--class", "item 3", "--model", str(models / "dit"), "--steps", "2", "--seed", "0", "-o")
    assert run(*call, "plain.png") == 0
    assert run(*call, "lora.png", "--lora", "lora.safetensors") == 0
    pixels = [Image.open(file).tobytes() for file in ("plain.png", "lora.png")]
    assert pixels[0] != pixels[1]
    assert run("replay", "lora.png", "-o", "again.png") == 0
    assert "lora.png: equal" in capsys.readouterr().out


def test_doctor_needs_no_text_encoder(
    models: Path, tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_discs(tmp_path / "pictures")
    uncaptioned = tmp_path / "classes"
    for i, file in enumerate(sorted(data.glob("*.png"))):
        (uncaptioned / f"item {i % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, uncaptioned / f"item {i % 2}")
    for kind, pictures in (("pixart", data), ("dit", data), ("dit", uncaptioned)):
        assert run("doctor", str(pictures), "--model", str(models / kind), "--sheet", f"{kind}.png") == 0
        said = capsys.readouterr().out
        assert "give 8 of these pictures back, at 16x16" in said.replace("gives", "give")
        assert Path(f"{kind}.png").is_file()
