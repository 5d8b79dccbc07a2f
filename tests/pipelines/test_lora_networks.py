"""LoRAs in every kind of network: text encoders with DoRA's magnitudes, compiled networks, factors that are numbers."""

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import ATTENTION, diffusers_lora, lora_weights
from safetensors.torch import save_file
from tiny import draw, tiny_pipeline
from torch import Tensor

LAYERS = {"clip": ["q_proj", "v_proj", "fc1"], "bert": ["query", "value", "intermediate.dense"]}


def dora(encoder: Any, kind: str, factor: float) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """A DoRA in diffusers' and in kohya's names, and a copy of the encoder with its effect in the weights.

    DoRA (Liu et al. 2024), Eq. 5: W' = m (W + alpha/r B A) / |W + alpha/r B A|, a norm for each output.
    """
    torch.manual_seed(0)
    named: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    merged = copy.deepcopy(encoder)
    for name, layer in merged.named_modules():
        if not name.endswith(tuple(f".{end}" for end in LAYERS[kind])):
            continue
        weight = layer.weight.data
        down, up = 0.3 * torch.randn(2, weight.shape[1]), 0.3 * torch.randn(weight.shape[0], 2)
        magnitude = factor * weight.norm(dim=1)
        start = f"text_encoder.{name}"
        named |= {
            f"{start}.lora_A.weight": down,
            f"{start}.lora_B.weight": up,
            f"{start}.lora_magnitude_vector": magnitude,
        }
        flat = f"lora_te_{'text_model_' if kind == 'clip' else ''}{name.removeprefix('text_model.').replace('.', '_')}"
        kohya |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.dora_scale": magnitude[:, None],
            f"{flat}.alpha": torch.tensor(2.0),
        }
        direction = weight + up @ down
        layer.weight.data = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert len(named) >= 18 or kind == "clip"
    return named, kohya, merged


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_magnitudes_reach_text_encoders(tmp_path: Path, kind: str, form: str) -> None:
    states = {}
    for factor in (1.0, 3.0):
        pipeline = tiny_pipeline(kind)
        named, kohya, merged = dora(pipeline.text_encoder, kind, factor)
        save_file(named if form == "diffusers" else kohya, tmp_path / "dora.safetensors")
        loaded = pipeline.load_lora_weights(tmp_path / "dora.safetensors")
        assert not loaded.unmatched
        ids = torch.tensor([[3, 4, 5, 6]])
        with torch.no_grad():
            states[factor] = pipeline.text_encoder(ids)[0]
            torch.testing.assert_close(states[factor], merged(ids)[0], atol=1e-4, rtol=1e-4)
    assert (states[1.0] - states[3.0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["a", "lora", "weight"])
def test_nothing_is_called_newly_initialized(tmp_path: Path, name: str, caplog: Any) -> None:
    pipeline = tiny_pipeline("clip")
    file = diffusers_lora(tiny_pipeline("clip"), tmp_path)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(file, adapter_name=name)
    assert not [record.message for record in caplog.records]


def test_a_lora_in_compiled_networks(tmp_path: Path) -> None:
    """All methods for adapters see through what ``torch.compile`` returns."""
    plain, compiled = tiny_pipeline("clip"), tiny_pipeline("clip")
    before = draw(plain)
    file = diffusers_lora(tiny_pipeline("clip"), tmp_path / "lora")
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    compiled.text_encoder = torch.compile(compiled.text_encoder, backend="eager")
    draw(compiled)
    for pipeline in (plain, compiled):
        pipeline.load_lora_weights(file, adapter_name="a", scale=0.5)
    assert compiled.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}
    assert type(compiled.unet).__name__ == "OptimizedModule"
    changed = draw(plain)
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(draw(compiled), changed, atol=1e-4, rtol=0)
    compiled.fuse_lora()
    compiled.unload_lora_weights()
    compiled.save_pretrained(tmp_path / "model")
    compiled.save_single_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(draw(type(plain).from_pretrained(tmp_path / "model")), changed, atol=1e-4, rtol=0)


def test_a_word_for_a_compiled_text_encoder() -> None:
    plain, compiled = tiny_pipeline("clip"), tiny_pipeline("clip")
    compiled.text_encoder = torch.compile(compiled.text_encoder, backend="eager")
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    for pipeline in (plain, compiled):
        pipeline.load_textual_inversion({"<cup>": vectors})
    torch.testing.assert_close(draw(compiled, "a <cup>"), draw(plain, "a <cup>"), atol=1e-4, rtol=0)
    compiled.unload_textual_inversion("<cup>")
    assert "<cup>" not in compiled.tokenizer.get_vocab()


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_factors_are_finite(tmp_path: Path, factor: float) -> None:
    pipeline = tiny_pipeline("clip")
    file = diffusers_lora(tiny_pipeline("clip"), tmp_path)
    with pytest.raises(ValueError, match="give a finite number"):
        pipeline.load_lora_weights(file, scale=factor)
    assert pipeline.get_list_adapters() == {}
    pipeline.load_lora_weights(file, adapter_name="a")
    expected = draw(pipeline)
    for weights in (factor, [factor], [{"unet": factor}]):
        with pytest.raises(ValueError, match="give a finite number"):
            pipeline.set_adapters(["a"], weights)
    with pytest.raises(ValueError, match="give a finite number"):
        pipeline.fuse_lora(lora_scale=factor)
    with pytest.raises(ValueError, match=r"finite|must be a number"):
        draw(pipeline, cross_attention_kwargs={"scale": factor})
    torch.testing.assert_close(draw(pipeline), expected, atol=0, rtol=0)


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias"])
def test_all_parts_of_a_layer_are_finite(tmp_path: Path, part: str) -> None:
    pipeline = tiny_pipeline("clip")
    more = {"use_dora": True} if "magnitude" in part else {"lora_bias": True}
    state, _ = lora_weights(pipeline.unet, ATTENTION, **more)
    layers = {f"unet.{key}": tensor for key, tensor in state.items()}
    key = next(key for key in layers if part in key)
    layers[key] = layers[key].clone()
    layers[key][0] = math.nan
    with pytest.raises(ValueError, match=r"not finite \(nan or inf\)"):
        pipeline.load_lora_weights(layers)
    assert pipeline.get_list_adapters() == {}


def test_a_lora_in_networks_that_are_offloaded(tmp_path: Path) -> None:
    plain, offloaded = tiny_pipeline("clip"), tiny_pipeline("clip")
    file = diffusers_lora(tiny_pipeline("clip"), tmp_path)
    cpu = torch.device("cpu")
    offloaded.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    for pipeline in (plain, offloaded):
        draw(pipeline)
        pipeline.load_lora_weights(file)
    torch.testing.assert_close(draw(offloaded), draw(plain), atol=1e-5, rtol=0)
