"""Autoencoders in files of their own, with the names of the code they were released with; whole ones and broken ones.

That code was run beside ours on the same random weights (CompVis' latent-diffusion and taming-transformers: kl-f4 to
f32, vq-f4 to f16, VQGAN f16, Gumbel f8): encoder, codes and decoder agree to 5e-14 in float64, and every code is the
same. Here the names and shapes of its weights are written down once more.
"""

import logging
import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.interchange.single_file import original_autoencoder, plain_config
from latentdiff.models import AutoencoderKL, FSQModel, GumbelVQModel, VQModel

Shapes = dict[str, tuple[int, ...]]
VQ_F2: dict[str, Any] = {"mult": (1, 2), "z": 4, "attention": (1,), "codes": 16}
KL_F2: dict[str, Any] = {"mult": (1, 2), "z": 4}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "kl": (AutoencoderKL, KL_F2),
    "kl, attention": (AutoencoderKL, {"mult": (1, 1, 2), "z": 16, "attention": (1, 2)}),
    "kl, no quant_conv": (AutoencoderKL, KL_F2 | {"quant": (False, False)}),
    "kl, one quant_conv": (AutoencoderKL, KL_F2 | {"quant": (False, True)}),
    "vq": (VQModel, VQ_F2),
    "vq, no attention": (VQModel, {"mult": (1, 2), "z": 3, "codes": 8, "middle_attends": False}),
    "vq, embed_dim": (VQModel, VQ_F2 | {"dim": 3}),
    "vqgan": (VQModel, {"mult": (1, 1, 2), "z": 32, "attention": (2,), "codes": 8}),
    "gumbel": (GumbelVQModel, {"mult": (1, 2), "z": 32, "attention": (1,), "codes": 8, "gumbel": True}),
    "f1": (VQModel, {"mult": (1,), "z": 3, "codes": 8}),
}


def conv(name: str, out: int, inside: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (out, inside, size, size), f"{name}.bias": (out,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def resnet(name: str, inside: int, out: int) -> Shapes:
    found = norm(f"{name}.norm1", inside) | conv(f"{name}.conv1", out, inside)
    found |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out)
    return found if inside == out else found | conv(f"{name}.nin_shortcut", out, inside, 1)


def attend(name: str, channels: int) -> Shapes:
    found = norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        found |= conv(f"{name}.{part}", channels, channels, 1)
    return found


def middle(name: str, channels: int, attends: bool) -> Shapes:
    found = resnet(f"{name}.block_1", channels, channels) | resnet(f"{name}.block_2", channels, channels)
    return found | attend(f"{name}.attn_1", channels) if attends else found


def coder(name: str, widths: list[int], ends: tuple[int, int], attention: tuple[int, ...], blocks: int) -> Shapes:
    """Of the encoder's way down, or the decoder's way up, whose levels are numbered the same way."""
    down, last = name == "encoder", len(widths) - 1
    order = range(len(widths)) if down else range(last, -1, -1)
    before = widths[0] if down else widths[-1]
    found = conv(f"{name}.conv_in", before, ends[0])
    for level in order:
        place = f"{name}.{'down' if down else 'up'}.{level}"
        for block in range(blocks):
            found |= resnet(f"{place}.block.{block}", before, widths[level])
            before = widths[level]
            if level in attention:
                found |= attend(f"{place}.attn.{block}", before)
        if level != (last if down else 0):
            found |= conv(f"{place}.{'down' if down else 'up'}sample.conv", before, before)
    return found | norm(f"{name}.norm_out", before) | conv(f"{name}.conv_out", ends[1], before)


def shapes(
    mult: tuple[int, ...],
    z: int,
    attention: tuple[int, ...] = (),
    codes: int | None = None,
    dim: int | None = None,
    gumbel: bool = False,
    middle_attends: bool = True,
    quant: tuple[bool, bool] = (True, True),
) -> Shapes:
    """The weights of a released autoencoder with `mult` times 32 channels on its levels."""
    widths, moments = [32 * m for m in mult], z if codes else 2 * z
    found = coder("encoder", widths, (3, moments), attention, 1) | coder("decoder", widths, (z, 3), attention, 2)
    for part in ("encoder", "decoder"):
        found |= middle(f"{part}.mid", widths[-1], middle_attends)
    dim = dim or z
    if quant[0]:
        found |= conv("quant_conv", dim if codes else moments, moments, 1)
    if quant[1]:
        found |= conv("post_quant_conv", z, dim, 1)
    if gumbel:
        found |= conv("quantize.proj", codes or 0, z, 1) | {"quantize.embed.weight": (codes or 0, dim)}
    elif codes:
        found["quantize.embedding.weight"] = (codes, dim)
    return found


def weights_of(case: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes(**CASES[case][1]).items()}


def losses() -> dict[str, Tensor]:
    """What training checkpoints hold besides."""
    names = ("loss.logvar", "loss.discriminator.main.0.weight", "loss.perceptual_loss.net.slice1.0.weight")
    return {name: torch.randn(3) for name in names}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "whole"])
def test_round_trip(case: str, whole: bool, tmp_path: Path, file: Path) -> None:
    kind, weights = CASES[case][0], weights_of(case)
    beginning = "first_stage_model." if whole else ""
    torch.save({"state_dict": {beginning + n: t for n, t in (weights | losses()).items()}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is a pickle, which is only read if asked for"):
        kind.from_single_file(tmp_path / "a.ckpt")
    model = kind.from_single_file(tmp_path / "a.ckpt", allow_pickle=True, scaling_factor=0.5, sample_size=64)
    assert (model.config.scaling_factor, model.config.sample_size, model.training) == (0.5, 64, False)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.values())
    model.save_single_file(file)
    written = load_file(file)
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())
    again = kind.from_single_file(file)
    assert plain_config(again) == plain_config(model)
    pixels = torch.rand(1, 3, 16, 24) * 2 - 1
    assert torch.equal(again(pixels).sample, model(pixels).sample)
    model.save_pretrained(tmp_path / "folder")
    assert torch.equal(kind.from_pretrained(tmp_path / "folder")(pixels).sample, model(pixels).sample)
    if kind is not GumbelVQModel:
        theirs = getattr(diffusers, kind.__name__).from_pretrained(tmp_path / "folder")
        torch.testing.assert_close(theirs(pixels).sample, model(pixels).sample, atol=1e-5, rtol=1e-5)


def test_diffusers_reads_the_names_the_same_way(tmp_path: Path) -> None:
    weights = weights_of("kl")
    save_file(weights, tmp_path / "a.safetensors")
    model = AutoencoderKL.from_single_file(tmp_path / "a.safetensors")
    theirs = diffusers.AutoencoderKL.from_config(model.config)
    wanted = convert_ldm_vae_checkpoint(dict(weights), theirs.config)
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor.reshape(found[name].shape)) for name, tensor in wanted.items())


def test_of_several_precisions(tmp_path: Path, file: Path) -> None:
    save_file({name: tensor.half() for name, tensor in weights_of("vq").items()}, file)
    assert VQModel.from_single_file(file).dtype == torch.float32
    assert VQModel.from_single_file(file, dtype=None).dtype == torch.float16
    model = VQModel.from_single_file(file, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_single_file(tmp_path / "b.safetensors", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.float16}
    with pytest.raises(FileExistsError, match="is there already"):
        model.save_single_file(tmp_path / "b.safetensors")
    model.save_single_file(tmp_path / "b.safetensors", overwrite=True)
    with pytest.raises(ValueError, match=r"name it b.safetensors"):
        model.save_single_file(tmp_path / "b.ckpt")


def test_averages_are_taken_when_asked_for(file: Path) -> None:
    weights = weights_of("vq")
    averages = {"model_ema." + name.replace(".", ""): tensor + 1 for name, tensor in weights.items()}
    counters = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    save_file(weights | averages | counters, file)
    name = "encoder.conv_in.weight"
    assert torch.equal(VQModel.from_single_file(file).state_dict()[name], weights[name])
    model = VQModel.from_single_file(file, ema=True)
    found, wanted = original_autoencoder(model), {f"first_stage_model.{n}": t + 1 for n, t in weights.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    del averages["model_ema.quantizeembeddingweight"]
    save_file(weights | averages, file)
    with pytest.raises(ValueError, match=r"of its autoencoder; quantize.embedding.weight has none; leave ema out"):
        VQModel.from_single_file(file, ema=True)
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"has no averaged weights .* of its autoencoder; leave ema out"):
        VQModel.from_single_file(file, ema=True)


def test_the_scale(tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = weights_of("kl")
    save_file(weights, file)
    with caplog.at_level(logging.WARNING):
        assert AutoencoderKL.from_single_file(file).config.scaling_factor == 0.18215
    assert "does not say how its latents are scaled; scaling_factor=0.18215 is assumed" in caplog.text
    caplog.clear()
    (tmp_path / "stage.yaml").write_text("model: {params: {embed_dim: 4, ddconfig: {z_channels: 4, resolution: 512}}}")
    first = AutoencoderKL.from_single_file(file, original_config=tmp_path / "stage.yaml", scaling_factor=0.3)
    assert (first.config.sample_size, first.config.scaling_factor) == (512, 0.3)
    (tmp_path / "whole.yaml").write_text(
        "model: {params: {scale_factor: 0.13, first_stage_config: {params: {ddconfig: {resolution: 128}}}}}"
    )
    second = AutoencoderKL.from_single_file(file, original_config=tmp_path / "whole.yaml")
    assert (second.config.sample_size, second.config.scaling_factor) == (128, 0.13)
    whole = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}
    save_file(whole | {"scale_factor": torch.tensor(0.25)}, file)  # where it was measured
    assert AutoencoderKL.from_single_file(file).config.scaling_factor == 0.25
    unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 4, 3, 3)}
    save_file(whole | unet, file)
    config = AutoencoderKL.from_single_file(file).config
    assert (config.scaling_factor, config.sample_size) == (0.18215, 128)  # 64 latents of 2 pixels
    save_file(whole | unet | {"conditioner.embedders.0.transformer.weight": torch.zeros(1)}, file)
    assert AutoencoderKL.from_single_file(file).config.scaling_factor == 0.13025
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="should be a number above 0"):
            AutoencoderKL.from_single_file(file, scaling_factor=scale)
    save_file(weights_of("vq"), file)
    assert VQModel.from_single_file(file).config.scaling_factor == 1.0
    assert caplog.text == ""


def without(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if not key.startswith(name)}


def reshaped(name: str, *shape: int) -> Any:
    return lambda weights: weights | {name: torch.zeros(shape)}


BROKEN: dict[str, tuple[str, Any, str]] = {
    "no codes": ("vq", reshaped("quantize.embedding.weight", 0, 4), r"quantize.embedding.weight .*the shape \[0, 4\]"),
    "flat codes": ("vq", reshaped("quantize.embedding.weight", 16), r"codebook .* has the shape \[16\]"),
    "no codebook": ("vq", lambda w: without("quantize.", w), "quantize.embedding.weight is missing; the encoder gives"),
    "no Gumbel codes": ("gumbel", lambda w: without("quantize.embed.", w), "quantize.embed.weight is missing"),
    "codes of another size": (
        "vq",
        reshaped("quantize.embedding.weight", 16, 5),
        r"quant_conv.weight should have the shape \[5, 4, 1, 1\], and has \[4, 4, 1, 1\]",
    ),
    "a tensor less": (
        "kl",
        lambda w: without("decoder.up.0.block.1.conv2.weight", w),
        r"1 weights of the autoencoder are missing, such as decoder.up.0.block.1.conv2.weight",
    ),
    "no beginning": (
        "kl",
        lambda w: without("encoder.conv_in", w),
        "encoder.conv_in.weight is missing; the",
    ),
    "no decoder": ("vq", lambda w: without("decoder.", w), "decoder.conv_in.weight is missing; the file is incomplete"),
    "a wrong shape": (
        "kl",
        reshaped("encoder.down.1.block.0.conv1.weight", 64, 31, 3, 3),
        r"encoder.down.1.block.0.conv1.weight should have the shape \[64, 32, 3, 3\], and has \[64, 31, 3, 3\]",
    ),
    "no dimensions": (
        "kl",
        reshaped("decoder.conv_in.weight", 7),
        r"decoder.conv_in.weight has the shape \[7\]; the",
    ),
    "another width of groups": ("kl", reshaped("encoder.down.1.block.0.conv2.weight", 33, 1), "multiple of norm_num"),
    "other attention": (
        "vq",
        reshaped("encoder.down.0.attn.0.to_qkv.weight", 3, 3, 1, 1),
        "1 weights have no place in the autoencoder, such as encoder.down.0.attn.0.to_qkv.weight",
    ),
    "two numbers of channels": (
        "kl",
        reshaped("post_quant_conv.weight", 4, 8, 1, 1),
        "its latents have 8 channels and its decoder is made for 4",
    ),
    "whole numbers": (
        "kl",
        lambda w: w | {"quant_conv.bias": torch.zeros(8, dtype=torch.int8)},
        "quant_conv.bias is of torch.int8; quantised weights are not supported",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_told(what: str, file: Path) -> None:
    case, change, told = BROKEN[what]
    save_file(change(weights_of(case)), file)
    with pytest.raises(ValueError, match=rf"model.safetensors.*{told}"):
        CASES[case][0].from_single_file(file)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_files_are_told(tmp_path: Path, file: Path, length: int) -> None:
    weights = weights_of("vq")
    save_file(weights, file)
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    for place in (file, tmp_path / "model.ckpt"):
        place.write_bytes(place.read_bytes()[: length if length >= 0 else -1000])
        with pytest.raises(ValueError, match=rf"{place.name} is damaged"):
            VQModel.from_single_file(place, allow_pickle=True)


@pytest.mark.parametrize(
    ("case", "wrong", "told"),
    [
        ("vq", AutoencoderKL, r"holds a codebook \(VQModel\); load it with VQModel.from_single_file"),
        ("kl", VQModel, r"holds no codebook .*load it with AutoencoderKL.from_single_file"),
        ("kl", GumbelVQModel, r"load it with AutoencoderKL.from_single_file"),
        ("gumbel", VQModel, r"a distribution over it \(GumbelVQModel\); load it with GumbelVQModel.from_single_file"),
        ("vq", FSQModel, r"load it with VQModel.from_single_file"),
    ],
)
def test_another_bottleneck_is_named(case: str, wrong: Any, told: str, file: Path) -> None:
    save_file(weights_of(case), file)
    with pytest.raises(ValueError, match=told):
        wrong.from_single_file(file)


def test_other_files_are_told(tmp_path: Path, file: Path) -> None:
    for name, told in (
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "diffusers' names; load it with that network's from_pretr"),
        ("something.weight", "something else; its first weight is something.weight"),
        ("input_blocks.0.0.weight", "has no autoencoder"),
    ):
        save_file({name: torch.zeros(1)}, file)
        with pytest.raises(ValueError, match=told):
            AutoencoderKL.from_single_file(file)
    with pytest.raises(FileNotFoundError, match=r"no.safetensors: no such file"):
        AutoencoderKL.from_single_file(tmp_path / "no.safetensors")
    with pytest.raises(TypeError, match=r"AutoencoderKL.from_single_file: unknown argument 'subfolder'"):
        AutoencoderKL.from_single_file(file, subfolder="vae")
    with pytest.raises(ValueError, match="not FSQModel, which the original code never had"):
        FSQModel(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",)).save_single_file(file)


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": weights_of("kl"), "callbacks": Runs(mark)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt holds more than tensors, .*nothing was run \(it asks for .*mkdir\)"):
        AutoencoderKL.from_single_file(tmp_path / "a.ckpt", allow_pickle=True)
    assert not mark.exists()
