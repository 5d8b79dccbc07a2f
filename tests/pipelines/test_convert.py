"""``latentdiff convert``: models, LoRAs and embeddings through all their forms, and what is left alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import typer
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from kinds import KINDS, make_model, same, weights
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from transformers import BertTokenizer
from typer.testing import CliRunner

from latentdiff import AutoencoderKL, ImageToImagePipeline, TextToImagePipeline, models
from latentdiff.pipelines.commands.convert import convert

app = typer.Typer()
app.command()(convert)


def run(*arguments: str | Path) -> str:
    """What the command says; it raises what it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def model(clip: dict[str, Any], tmp_path: Path) -> Callable[[str], Any]:
    """Makes a pipeline, and saves it and its tokenizer as folders."""

    def make(kind: str) -> Any:
        pipeline = make_model(kind, clip)
        pipeline.save_pretrained(tmp_path / "folder")
        pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
        return pipeline

    return make


@pytest.mark.parametrize("kind", ["sd1", "sd2", "inpainting", "upscaler"])
def test_folder_to_file_to_folder(model: Callable[[str], Any], tmp_path: Path, kind: str) -> None:
    pipeline = model(kind)
    run(tmp_path / "folder", tmp_path / "file.safetensors")
    said = run(tmp_path / "file.safetensors", tmp_path / "again", "--tokenizer", tmp_path / "tokenizer")
    assert said.replace("\n", "") == f"{tmp_path / 'again'}: {type(pipeline).__name__}"
    again = type(pipeline).from_pretrained(tmp_path / "again")
    same(weights(again), weights(pipeline))
    assert again.config["unet"] == ("diffusers", "UNet2DConditionModel")
    draw = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
    if kind in ("sd1", "sd2"):
        for one in (again, pipeline):
            one.set_progress_bar_config(disable=True)
        assert torch.equal(again("a", **draw).images, pipeline("a", **draw).images)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "tokenizer", "file.safetensors", "again"}


def test_precision_stays_or_is_chosen(model: Callable[[str], Any], tmp_path: Path) -> None:
    model("sd1")
    run(tmp_path / "folder", tmp_path / "half", "--dtype", "float16", "--variant", "fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert not (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    run(tmp_path / "half", tmp_path / "half.safetensors")  # the only variant is found
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    run(tmp_path / "half.safetensors", tmp_path / "plain", "--tokenizer", tmp_path / "tokenizer")
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        stored = load_file(tmp_path / "plain" / part / f"{name}.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    run(tmp_path / "plain", tmp_path / "full.safetensors", "--dtype", "float32")
    full, half = load_file(tmp_path / "full.safetensors"), load_file(tmp_path / "half.safetensors")
    same({key: value.half() for key, value in full.items()}, half)
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}


def test_both_variants(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    half = TextToImagePipeline.from_pretrained(tmp_path / "folder", dtype=torch.float16)
    with torch.no_grad():
        half.unet.conv_in.bias += 1
    half.save_pretrained(tmp_path / "folder", variant="fp16")
    run(tmp_path / "folder", tmp_path / "a.safetensors", "--from-variant", "fp16")
    run(tmp_path / "folder", tmp_path / "b.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.bias"
    assert torch.equal(load_file(tmp_path / "a.safetensors")[name], half.unet.conv_in.bias)
    assert torch.equal(load_file(tmp_path / "b.safetensors")[name], pipeline.unet.conv_in.bias)


def test_a_folder_keeps_its_kind(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    other = ImageToImagePipeline.from_pipe(pipeline)
    other.register_defaults(guidance_scale=3.0)
    other.save_pretrained(tmp_path / "drawing")
    run(tmp_path / "drawing", tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert index == json.loads((tmp_path / "drawing" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionImg2ImgPipeline"


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_one_network_alone(model: Callable[[str], Any], tmp_path: Path, component: str) -> None:
    pipeline = model("sd1")
    state = getattr(pipeline, component).state_dict()
    run(tmp_path / "folder", tmp_path / "all.safetensors")
    run(tmp_path / "folder", tmp_path / "one.safetensors", "--component", component)
    written = load_file(tmp_path / "one.safetensors")
    assert len(written) == len(state)
    assert written.keys().isdisjoint(load_file(tmp_path / "all.safetensors")) == (component == "vae")
    run(tmp_path / "one.safetensors", tmp_path / "part", "--component", component)
    run(tmp_path / "all.safetensors", tmp_path / "part-2", "--component", component, "--dtype", "bfloat16")
    name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    same(load_file(tmp_path / "part" / f"{name}.safetensors"), state)
    same(load_file(tmp_path / "part-2" / f"{name}.safetensors"), {key: one.bfloat16() for key, one in state.items()})
    if component == "vae":
        same(AutoencoderKL.from_pretrained(tmp_path / "part").state_dict(), state)
        said = run(tmp_path / "one.safetensors", tmp_path / "whole")  # there is nothing else in it
        assert said.replace("\n", "") == f"{tmp_path / 'whole'}: vae"
        same(AutoencoderKL.from_pretrained(tmp_path / "whole").state_dict(), state)
    if component == "unet":
        with pytest.raises(ValueError, match="has no vae; convert what it has alone, with --component unet"):
            run(tmp_path / "one.safetensors", tmp_path / "whole")
    run(tmp_path / "folder", tmp_path / "part", "--component", component, "--overwrite", "--dtype", "float16")
    same(load_file(tmp_path / "part" / f"{name}.safetensors"), {key: one.half() for key, one in state.items()})


CODER: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 3,
}


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel", "GumbelVQModel"])
def test_an_autoencoder_from_file_to_folder_and_back(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    own = {"num_vq_embeddings": 8} if kind != "AutoencoderKL" else {}
    model = getattr(models, kind)(**CODER, **own, scaling_factor=0.7)
    model.save_single_file(tmp_path / "with header.safetensors")
    weights = load_file(tmp_path / "with header.safetensors")
    averages = {"model_ema." + name.replace(".", ""): tensor + 1 for name, tensor in weights.items()}
    torch.save({"state_dict": {**weights, **averages, "loss.logvar": torch.zeros(1)}}, tmp_path / "model.ckpt")
    said = run(tmp_path / "model.ckpt", tmp_path / "folder", "--ckpt", "--scaling-factor", "0.3")
    assert said.replace("\n", "") == f"{tmp_path / 'folder'}: vae"
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"], config["sample_size"]) == (kind, 0.3, 256)
    same(getattr(models, kind).from_pretrained(tmp_path / "folder").state_dict(), model.state_dict())
    run(tmp_path / "folder", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), weights)
    assert getattr(models, kind).from_single_file(tmp_path / "back.safetensors").config.scaling_factor == 0.3
    run(tmp_path / "folder", tmp_path / "half", "--dtype", "float16", "--variant", "fp16")
    run(tmp_path / "half", tmp_path / "half.safetensors")  # the only variant is found
    same(load_file(tmp_path / "half.safetensors"), {name: tensor.half() for name, tensor in weights.items()})
    run(tmp_path / "model.ckpt", tmp_path / "averages.safetensors", "--ckpt", "--ema")
    same(load_file(tmp_path / "averages.safetensors"), {name: tensor + 1 for name, tensor in weights.items()})
    run(tmp_path / "with header.safetensors", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["scaling_factor"] == 0.7


def test_a_network_alone_is_no_model(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    vae, unet = tmp_path / "folder" / "vae", tmp_path / "folder" / "unet"
    run(unet, tmp_path / "unet.safetensors")
    run(tmp_path / "unet.safetensors", tmp_path / "unet", "--component", "unet")
    same(load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"), pipeline.unet.state_dict())
    for arguments, message in (
        ((vae, tmp_path / "x", "--component", "unet"), "holds a vae alone, no unet"),
        ((vae, tmp_path / "x", "--to", "onnx"), "holds a vae alone, and only whole models are converted to ONNX"),
        ((vae, tmp_path / "x", "--scaling-factor", "1"), "--scaling-factor does nothing for a folder"),
        ((tmp_path / "unet.safetensors", tmp_path / "x", "--component", "unet", "--scaling-factor", "1"), "unet alone"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is damaged"):
        run(vae, tmp_path / "x")
    models.IdentityAutoencoder().save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match="not IdentityAutoencoder, which the original code never had"):
        run(tmp_path / "pixels", tmp_path / "x.safetensors")
    assert not (tmp_path / "x").exists()


def test_the_scale_of_a_whole_file(model: Callable[[str], Any], tmp_path: Path) -> None:
    model("sd1")
    run(tmp_path / "folder", tmp_path / "a.safetensors")
    options = ("--tokenizer", tmp_path / "tokenizer", "--scaling-factor", "0.25")
    run(tmp_path / "a.safetensors", tmp_path / "whole", *options)
    run(tmp_path / "a.safetensors", tmp_path / "part", "--component", "vae", "--scaling-factor", "0.25")
    for folder in (tmp_path / "whole" / "vae", tmp_path / "part"):
        assert json.loads((folder / "config.json").read_text())["scaling_factor"] == 0.25


def test_diffusers_folder_of_latent_diffusion(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "car"]
    bert = LDMBertModel(
        LDMBertConfig(vocab_size=len(words), d_model=16, encoder_layers=2, encoder_ffn_dim=32, head_dim=8)
    )
    unet = diffusers.UNet2DConditionModel(**{**KINDS["sd1"], "sample_size": 4})
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    theirs = diffusers.LDMTextToImagePipeline(vae.eval(), bert.eval(), tokenizer, unet.eval(), scheduler)
    theirs.save_pretrained(tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path / "ours")
    call = {"latents": torch.randn(1, 4, 4, 4), "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    theirs.set_progress_bar_config(disable=True)
    picture = theirs(["a red car"], **call).images
    for kind in (TextToImagePipeline, diffusers.StableDiffusionPipeline):
        ours = kind.from_pretrained(tmp_path / "ours")
        ours.set_progress_bar_config(disable=True)
        assert abs(ours("a red car", **call).images - picture).max() < 1e-4
    run(tmp_path / "ours", tmp_path / "file.safetensors")
    run(tmp_path / "file.safetensors", tmp_path / "again", "--tokenizer", tmp_path / "theirs" / "tokenizer")
    same(weights(TextToImagePipeline.from_pretrained(tmp_path / "again")), weights(ours))


def test_a_file_in_the_hubs_cache_needs_no_network(
    model: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = model("sd1")
    place = tmp_path / "cache" / "models--somebody--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    pipeline.save_single_file(place / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (
        "somebody/model/model.safetensors",
        "https://huggingface.co/somebody/model/blob/main/model.safetensors",
    ):
        read = TextToImagePipeline.from_single_file(
            source, tokenizer=pipeline.tokenizer, cache_dir=tmp_path / "cache", local_files_only=True
        )
        same(weights(read), weights(pipeline))
    with pytest.raises(FileNotFoundError, match=r"other.safetensors is not in the local cache, and the hub"):
        TextToImagePipeline.from_single_file(
            "somebody/model/other.safetensors", tokenizer=pipeline.tokenizer, cache_dir=tmp_path / "cache"
        )


@pytest.mark.slow
def test_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    tiny_pipeline().save_pretrained(tmp_path / "folder")
    run(tmp_path / "folder", tmp_path / "onnx", "--to", "onnx")
    for part in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        assert (tmp_path / "onnx" / part / "model.onnx").is_file()
    with pytest.raises(FileExistsError, match="is there already"):
        run(tmp_path / "folder", tmp_path / "onnx", "--to", "onnx")


def test_a_ckpt_is_read_when_asked_for(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    run(tmp_path / "folder", tmp_path / "file.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "file.safetensors")}, tmp_path / "file.ckpt")
    rest = ["--tokenizer", tmp_path / "tokenizer", "--prediction-type", "v_prediction"]
    with pytest.raises(ValueError, match=r"is a pickle, which is only read if asked for.*--ckpt"):
        run(tmp_path / "file.ckpt", tmp_path / "again", *rest)
    run(tmp_path / "file.ckpt", tmp_path / "again", "--ckpt", *rest)
    again = TextToImagePipeline.from_pretrained(tmp_path / "again")
    assert again.scheduler.config.prediction_type == "v_prediction"
    assert again.unet.config.sample_size == 64
    same(weights(again), weights(pipeline))


def test_nothing_is_replaced_unasked(model: Callable[[str], Any], tmp_path: Path) -> None:
    model("sd1")
    (tmp_path / "mine.safetensors").write_text("mine")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for target in ("mine.safetensors", "own"):
        with pytest.raises(FileExistsError, match="is there already; choose another name, or --overwrite"):
            run(tmp_path / "folder", tmp_path / target)
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["notes.txt"]
    assert (tmp_path / "mine.safetensors").read_text() == "mine"
    with pytest.raises(ValueError, match="is the source itself"):
        run(tmp_path / "folder", tmp_path / "folder", "--overwrite")
    run(tmp_path / "folder", tmp_path / "mine.safetensors", "--overwrite")
    assert len(load_file(tmp_path / "mine.safetensors")) > 100
    for name in ("own", "empty"):
        run(tmp_path / "folder", tmp_path / name, *(["--overwrite"] if name == "own" else []))
        TextToImagePipeline.from_pretrained(tmp_path / name)
    assert (tmp_path / "own" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_meant_is_refused(model: Callable[[str], Any], bert: dict[str, Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    for arguments, message in (
        ((folder, file, "--to", "kohya"), "--to kohya: a model can be converted to folder, file, onnx"),
        ((folder, file, "--variant", "fp16"), "--variant does nothing for a single file"),
        ((folder, file, "--ema"), "--ema does nothing for a folder"),
        ((folder, file, "--scaling-factor", "nan"), r"option scaling_factor: a finite number is expected \(got nan\)"),
        ((folder, file, "--scaling-factor", "0"), "option scaling_factor: .* greater than 0"),
        ((folder, tmp_path / "x", "--prediction-type", "epsilon"), "--prediction-type does nothing for a folder"),
        ((folder, tmp_path / "x", "--to", "onnx", "--component", "vae"), "--component does nothing for ONNX"),
        ((folder, tmp_path / "x.ckpt", "--to", "file"), r"written as safetensors; name it x.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run("nowhere", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"nowhere/lora\.safetensors: no such file"):
        run("nowhere/lora.safetensors", tmp_path / "x", "--to", "kohya")
    with pytest.raises(FileNotFoundError, match=r"is neither a pipeline folder, with a model_index.json, nor a LoRA's"):
        run(tmp_path / "tokenizer", tmp_path / "x")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="is of a FluxPipeline; these can be converted"):
        run(folder, file)
    TextToImagePipeline(**{**pipeline.components, **bert}).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"not a BertModel, .*; save_pretrained saves any pipeline as a folder"):
        run(tmp_path / "bert", file, "--component", "text_encoder")
    assert not file.exists()
    assert not (tmp_path / "x").exists()


def test_an_interrupted_write_leaves_nothing(
    model: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model("sd1")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr("latentdiff.interchange.adapter_files.save_file", full)
    monkeypatch.setattr("diffusers.DDIMScheduler.save_pretrained", full)
    for target in ("new.safetensors", "new"):
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "folder", tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def lora_file(file: Path) -> dict[str, torch.Tensor]:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 64), f"{name}.lora_B.weight": torch.randn(64, 2)}
    save_file(tensors, file)
    return tensors


def test_lora_through_all_formats(tmp_path: Path) -> None:
    tensors = lora_file(tmp_path / "lora.safetensors")
    said = run(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", "--to", "kohya")
    assert "from diffusers, 1 layers of the unet" in said.replace("\n", "")
    assert any(key.startswith("lora_unet_") for key in load_file(tmp_path / "kohya.safetensors"))
    run(tmp_path / "kohya.safetensors", tmp_path / "peft", "--to", "peft")
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
    run(tmp_path / "peft", tmp_path / "back.safetensors", "--to", "diffusers")
    same(load_file(tmp_path / "back.safetensors"), tensors)
    with pytest.raises(ValueError, match="is a LoRA; say in which format to write it: --to diffusers, peft, kohya"):
        run(tmp_path / "lora.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="--to onnx: a LoRA can be converted to diffusers, peft, kohya"):
        run(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", "--to", "onnx")
    with pytest.raises(ValueError, match="--dtype does nothing for a lora"):
        run(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", "--to", "peft", "--dtype", "float16")
    with pytest.raises(FileExistsError, match="is there already"):
        run(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", "--to", "kohya")


def test_embeddings(tmp_path: Path) -> None:
    vectors = torch.randn(2, 4)
    params = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})  # as in the original code's files
    torch.save({"string_to_param": params, "name": "cat"}, tmp_path / "cat.pt")
    torch.save({"<my.cat>": vectors}, tmp_path / "cat.bin")
    with pytest.raises(ValueError, match=r"cat.pt is a pickle, which is only read if asked for"):
        run(tmp_path / "cat.pt", tmp_path / "cat.safetensors")
    said = run(tmp_path / "cat.pt", tmp_path / "cat.safetensors", "--ckpt")
    assert "cat (2 vectors of 4)" in said.replace("\n", "")
    same(load_file(tmp_path / "cat.safetensors"), {"cat": vectors})
    run(tmp_path / "cat.bin", tmp_path / "dot.safetensors", "--ckpt")
    same(load_file(tmp_path / "dot.safetensors"), {"<my.cat>": vectors})
    run(tmp_path / "cat.safetensors", tmp_path / "other.safetensors", "--to", "a1111")
    same(load_file(tmp_path / "other.safetensors"), {"emb_params": vectors})
    with pytest.raises(ValueError, match="--to peft: an embedding can be converted to diffusers, a1111"):
        run(tmp_path / "cat.safetensors", tmp_path / "x.safetensors", "--to", "peft")
