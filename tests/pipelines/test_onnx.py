"""ONNX: each network's numbers with onnxruntime are torch's, and diffusers' pipeline for ONNX draws our picture."""

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from latentdiff import extras
from latentdiff.codec import Codec
from latentdiff.pipelines.storage import onnx as onnx_export
from latentdiff.pipelines.storage.onnx import LATENTS_SCALE, PARTS, DecoderGraph, EncoderGraph, export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOKENS = 12


def run(folder: Path, part: str, **inputs: Any) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(folder / part / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in inputs.items()})


def draw_both(pipeline: Any, folder: Path, prompt: Any, factor: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(B, H, W, 3) by our pipeline and by diffusers' for ONNX, which takes the autoencoder's factor for 8."""
    if not hasattr(diffusers, "OnnxStableDiffusionPipeline"):
        pytest.skip("this diffusers has no pipeline for ONNX any more")
    count = len(prompt)
    noise = torch.randn(count, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": ["a"] * count, "output_type": "np"}
    ours = pipeline(prompt, latents=noise, height=8 * factor, width=12 * factor, **call).images
    other = diffusers.OnnxStableDiffusionPipeline.from_pretrained(folder)
    other.set_progress_bar_config(disable=True)
    return ours, other(prompt, latents=noise.numpy(), height=64, width=96, **call).images


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A pipeline with a text encoder whose padding is masked, and its folder."""
    pipeline = tiny_pipeline("bert")
    return pipeline, export_onnx(pipeline, tmp_path_factory.mktemp("onnx") / "model")


@pytest.mark.slow  # an export takes twenty seconds
@pytest.mark.parametrize("batch", [1, 3])
def test_networks_give_torchs_numbers(exported: tuple[Any, Path], batch: int) -> None:
    pipeline, folder = exported
    torch.manual_seed(batch)
    width = pipeline.unet.config.cross_attention_dim
    latents, states = torch.randn(batch, 4, 6 + 4 * batch, 8), torch.randn(batch, 4 + batch, width)
    words = ["a red thing"] * batch
    tokens = pipeline.tokenizer(words, padding="max_length", max_length=TOKENS - batch, return_tensors="pt")
    ids = tokens.input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(ids, attention_mask=tokens.attention_mask)
        noise = pipeline.unet(latents, torch.tensor([7.0]), states).sample
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        posterior = pipeline.vae.encode(pixels).latent_dist
    given = run(folder, "text_encoder", input_ids=ids.numpy().astype(np.int32))
    np.testing.assert_allclose(given[0], text.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(given[1], text.pooler_output, atol=1e-4)
    timestep = np.array([7.0], dtype=np.float32)
    given = run(folder, "unet", sample=latents, timestep=timestep, encoder_hidden_states=states)
    np.testing.assert_allclose(given[0], noise, atol=1e-4)
    given = run(folder, "vae_decoder", latent_sample=latents / LATENTS_SCALE)
    np.testing.assert_allclose(given[0], pixels, atol=1e-4)
    mean, parameters = run(folder, "vae_encoder", sample=pixels)
    scale = pipeline.vae.config.scaling_factor
    np.testing.assert_allclose(mean * LATENTS_SCALE, posterior.mean * scale, atol=1e-4)
    np.testing.assert_allclose(parameters[:, :4], mean, atol=1e-6)
    deviation = np.exp(parameters[:, 4:] / 2) * LATENTS_SCALE
    np.testing.assert_allclose(deviation, posterior.std * scale, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [["a red cup"], ["a red cup", "a blue thing"]])
def test_diffusers_draws_the_same_picture(exported: tuple[Any, Path], prompts: list[str]) -> None:
    ours, theirs = draw_both(*exported, prompts)
    assert ours.std() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_other_kinds_of_parts(tmp_path: Path) -> None:
    """CLIP, a codebook, a UNet with learned variances in half precision: the pictures are the same."""
    pipeline = tiny_pipeline("clip", "vq", out_channels=8, use_linear_projection=True)
    expected = {name: copy.deepcopy(parameter) for name, parameter in pipeline.unet.named_parameters()}
    export_onnx(pipeline, tmp_path / "model")
    ours, theirs = draw_both(pipeline, tmp_path / "model", ["a red cup"])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, expected[name])


@pytest.mark.slow
def test_folder_is_laid_out_as_others_expect(exported: tuple[Any, Path]) -> None:
    _, folder = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "OnnxStableDiffusionPipeline"
    for name in PARTS:
        assert index[name] == ["diffusers", "OnnxRuntimeModel"]
        assert sorted(path.name for path in (folder / name).iterdir()) == ["config.json", "model.onnx"]
    assert json.loads((folder / "vae_decoder/config.json").read_text())["scaling_factor"] == LATENTS_SCALE
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    session = onnxruntime.InferenceSession(folder / "unet/model.onnx", providers=["CPUExecutionProvider"])
    inputs = {one.name: one.shape for one in session.get_inputs()}
    assert inputs["sample"] == ["batch_size", 4, "height", "width"]
    assert inputs["encoder_hidden_states"][1] == "sequence_length"


@pytest.mark.slow
def test_big_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 10_000)
    pipeline = tiny_pipeline("bert").to(torch.bfloat16)
    export_onnx(pipeline, tmp_path / "model")
    assert (tmp_path / "model/unet/model.onnx.data").stat().st_size > 10_000
    assert pipeline.unet.dtype == torch.bfloat16
    ours, theirs = draw_both(pipeline.to(torch.float32), tmp_path / "model", ["a red cup"])
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_graphs_scale_and_shift_as_the_codec(kind: str) -> None:
    vae = tiny_pipeline("bert", kind).vae
    if kind == "kl":
        vae.register_to_config(shift_factor=0.3)
    codec, pixels = Codec(vae), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        posterior = codec.posterior(pixels)
        mean, *parameters = EncoderGraph(vae)(pixels)
        latents = codec.scaled(posterior.mean)
        torch.testing.assert_close(mean * LATENTS_SCALE, latents)
        if parameters:
            std = (parameters[0].chunk(2, dim=1)[1] / 2).exp() * LATENTS_SCALE
            torch.testing.assert_close(std, posterior.std * codec.scale)
        torch.testing.assert_close(DecoderGraph(vae)(latents / LATENTS_SCALE), codec.decode(latents))


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    pipeline = tiny_pipeline("bert")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        export_onnx(pipeline, tmp_path / "full")
    with pytest.raises(ValueError, match="a DDPMPipeline cannot be exported"):
        export_onnx(diffusers.DDPMPipeline(pipeline.unet, pipeline.scheduler), tmp_path / "model")
    with pytest.raises(ValueError, match="class embeddings"):
        export_onnx(tiny_pipeline("bert", num_class_embeds=3), tmp_path / "model")
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"the unet has LoRAs loaded, so it cannot be exported; .*fuse_lora"):
        export_onnx(pipeline, tmp_path / "model")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'onnx>=.*' 'onnxruntime>=.*' 'onnxscript>="):
        export_onnx(tiny_pipeline("bert"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.slow
def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("bert")
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, return_dict: decode(z, return_dict) if z.sum() > 0 else (z,)
    with pytest.raises(ValueError, match="torch cannot export the vae_decoder"):
        export_onnx(pipeline, tmp_path / "model")
    assert not list(tmp_path.iterdir())
