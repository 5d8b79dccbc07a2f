"""LoRA between formats: the same pictures from every file, ours and diffusers' where it can read it."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import ATTENTION, diffusers_lora, lora_weights, sd_scripts_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import draw

from latentdiff.interchange.lora.formats import LoraFile, convert_lora
from latentdiff.interchange.lora.layers import read_layers

Make = Callable[..., tuple[Any, Any]]


@pytest.fixture
def fresh(twins: Any) -> Make:
    """Pipelines of ours and diffusers' with equal networks of their own."""
    import diffusers

    from latentdiff import TextToImagePipeline

    def make(**unet: Any) -> tuple[Any, Any]:
        ours, theirs = twins(TextToImagePipeline, diffusers.StableDiffusionPipeline, unet=unet)
        ours.text_encoder, theirs.text_encoder = copy.deepcopy((ours.text_encoder, theirs.text_encoder))
        return ours, theirs

    return make


def drawn(fresh: Make, file: Path, theirs: bool = False, **unet: Any) -> torch.Tensor:
    """The picture of new pipelines with the LoRA; by ours, and `theirs` if they are to agree."""
    pipelines = fresh(**unet)
    loaded = pipelines[0].load_lora_weights(file)
    assert loaded.matched
    assert not loaded.unmatched
    picture = draw(pipelines[0], "a red car")
    if theirs:
        pipelines[1].load_lora_weights(str(file))
        torch.testing.assert_close(picture, draw(pipelines[1], "a red car"), atol=1e-4, rtol=0)
    return picture


def same_layers(one: Path, other: Path) -> None:
    """Equal to the last bit."""
    layers, others = (read_layers(file.state, file.config)[0] for file in (LoraFile(one), LoraFile(other)))
    assert layers.keys() == others.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.down, others[name].down), name
        assert torch.equal(layer.up, others[name].up), name
        assert layer.alpha == pytest.approx(others[name].alpha, rel=1e-6), name


@pytest.mark.parametrize("linear", [False, True], ids=["as SD 1", "as SD 2"])
def test_round_trips_from_diffusers(fresh: Make, tmp_path: Path, linear: bool) -> None:
    unet = {"use_linear_projection": linear}
    source = diffusers_lora(fresh(**unet)[0], tmp_path / "source")
    plain, expected = draw(fresh(**unet)[0], "a red car"), drawn(fresh, source, theirs=True, **unet)
    assert (expected - plain).abs().max() > 0.01
    report = convert_lora(source, tmp_path / "kohya.safetensors", "kohya")
    assert report.layers.keys() == {"unet", "text_encoder"}
    assert report.ranks == (2, 3)
    assert report.scales == (0.5, 1.5, 2.0)
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "peft", "peft")
    convert_lora(tmp_path / "peft", tmp_path / "again", "diffusers")
    for place in ("kohya.safetensors", "peft", "again"):
        torch.testing.assert_close(drawn(fresh, tmp_path / place, **unet), expected, atol=1e-5, rtol=0)
        same_layers(source, tmp_path / place)
    drawn(fresh, tmp_path / "again/pytorch_lora_weights.safetensors", theirs=True, **unet)


def test_round_trips_from_kohya(fresh: Make, tmp_path: Path) -> None:
    source = sd_scripts_lora(fresh()[0], tmp_path / "source.safetensors")
    expected = drawn(fresh, source)
    convert_lora(source, tmp_path / "diffusers.safetensors", "diffusers")
    torch.testing.assert_close(drawn(fresh, tmp_path / "diffusers.safetensors", theirs=True), expected)
    convert_lora(tmp_path / "diffusers.safetensors", tmp_path / "peft", "peft")
    convert_lora(tmp_path / "peft", tmp_path / "kohya.safetensors", "kohya")
    torch.testing.assert_close(drawn(fresh, tmp_path / "kohya.safetensors"), expected, atol=1e-5, rtol=0)
    before, after = load_file(source), load_file(tmp_path / "kohya.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key].to(tensor.dtype), tensor)
        assert tensor.dtype == after[key].dtype or key.endswith(".alpha")
    with safe_open(tmp_path / "kohya.safetensors", "pt") as stream:
        header = stream.metadata()
    assert header["ss_network_args"] == '{"conv_dim": "2", "conv_alpha": "1"}'
    assert "sshs_model_hash" not in header  # it was of the other file


def test_kohyas_files_draw_what_diffusers_draws(fresh: Make, tmp_path: Path) -> None:
    """Where diffusers reads one rightly: attention only, one alpha."""
    source = sd_scripts_lora(fresh()[0], tmp_path / "all.safetensors")
    state = {key: value for key, value in load_file(source).items() if "_attn" in key or "lora_te_" in key}
    save_file(state, tmp_path / "attention.safetensors")
    expected = drawn(fresh, tmp_path / "attention.safetensors", theirs=True)
    convert_lora(tmp_path / "attention.safetensors", tmp_path / "diffusers", "diffusers")
    convert_lora(tmp_path / "diffusers", tmp_path / "again.safetensors", "kohya")
    torch.testing.assert_close(drawn(fresh, tmp_path / "again.safetensors", theirs=True), expected)


def test_blocks_of_the_original_code(fresh: Make, tmp_path: Path) -> None:
    unet = {"layers_per_block": 2}
    ours = fresh(**unet)[0]
    expected = drawn(fresh, sd_scripts_lora(ours, tmp_path / "new.safetensors"), **unet)
    inside = {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj"}
    blocks = {
        **{f"down_blocks.0.resnets.{i}": f"input_blocks.{1 + i}.0" for i in (0, 1)},
        **{f"down_blocks.0.attentions.{i}": f"input_blocks.{1 + i}.1" for i in (0, 1)},
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        **{f"down_blocks.1.resnets.{i}": f"input_blocks.{4 + i}.0" for i in (0, 1)},
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        **{f"up_blocks.0.resnets.{i}": f"output_blocks.{i}.0" for i in (0, 1, 2)},
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        **{f"up_blocks.1.resnets.{i}": f"output_blocks.{3 + i}.0" for i in (0, 1, 2)},
        **{f"up_blocks.1.attentions.{i}": f"output_blocks.{3 + i}.1" for i in (0, 1, 2)},
    }
    old = sd_scripts_lora(ours, tmp_path / "old.safetensors", blocks)
    state = load_file(old)
    for theirs, diffusers_name in {**inside, "skip_connection": "conv_shortcut"}.items():
        state = {
            key.replace(f"_{diffusers_name}.", f"_{theirs.replace('.', '_')}.") if "blocks" in key else key: value
            for key, value in state.items()
        }
    state = {key.replace("middle_block_0_conv1", "middle_block_0_in_layers_2"): value for key, value in state.items()}
    save_file(state, old)
    assert "lora_unet_output_blocks_2_1_conv.alpha" in state
    assert "lora_unet_input_blocks_4_0_in_layers_2.alpha" in state
    torch.testing.assert_close(drawn(fresh, old, **unet), expected)
    report = convert_lora(old, tmp_path / "diffusers.safetensors", "diffusers")
    assert report.source_format == "kohya (original blocks)"
    torch.testing.assert_close(drawn(fresh, tmp_path / "diffusers.safetensors", theirs=True, **unet), expected)


def test_diffusers_older_spellings(fresh: Make, tmp_path: Path) -> None:
    ours = fresh()[0]
    new = diffusers_lora(ours, tmp_path, rank_pattern={}, alpha_pattern={}, rank=3, alpha=3)
    state = load_file(new)
    old = {}
    for key, value in state.items():
        key = key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        for name in ("to_q", "to_k", "to_v"):
            key = key.replace(f".{name}.lora.", f".processor.{name}_lora.")
        key = key.replace(".to_out.0.lora.", ".processor.to_out_lora.")
        for name in ("q", "k", "v", "out"):
            key = key.replace(f"self_attn.{name}_proj.lora.", f"self_attn.to_{name}_lora.")
        old[key.replace("fc1.lora.", "fc1.lora_linear_layer.").replace(".encoder.", ".text_model.encoder.")] = value
    save_file(old, tmp_path / "old.safetensors")
    report = convert_lora(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "diffusers")
    assert report.source_format == "diffusers (old)"
    assert report.scales == (1.0,)
    expected = drawn(fresh, tmp_path / "new.safetensors", theirs=True)
    torch.testing.assert_close(drawn(fresh, tmp_path / "old.safetensors"), expected)
    bare = {key.removeprefix("unet."): value for key, value in old.items() if key.startswith("unet.up_blocks")}
    save_file(bare, tmp_path / "bare.safetensors")
    assert drawn(fresh, tmp_path / "bare.safetensors").isfinite().all()


def test_peft_loads_its_format(fresh: Make, tmp_path: Path) -> None:
    from peft import PeftModel

    ours = fresh()[0]
    source = sd_scripts_lora(ours, tmp_path / "source.safetensors")
    convert_lora(source, tmp_path / "peft", "peft")
    expected = drawn(fresh, source)
    ours.unet = PeftModel.from_pretrained(ours.unet, tmp_path / "peft/unet").merge_and_unload()
    encoder = PeftModel.from_pretrained(ours.text_encoder, tmp_path / "peft/text_encoder")
    ours.text_encoder = encoder.merge_and_unload()
    torch.testing.assert_close(draw(ours, "a red car"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_relatives_of_lora(fresh: Make, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    ours = fresh()[0]
    state, config = lora_weights(ours.unet, [*ATTENTION, "conv1"], **{f"use_{kind}": True})
    type(ours).save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config)
    source = tmp_path / "pytorch_lora_weights.safetensors"
    expected = drawn(fresh, source, theirs=True)
    report = convert_lora(source, tmp_path / "kohya.safetensors", "kohya")
    assert report.scales == pytest.approx((6 / math.sqrt(3) if kind == "rslora" else 2.0,))
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "peft", "peft")
    for place in ("kohya.safetensors", "peft"):
        torch.testing.assert_close(drawn(fresh, tmp_path / place), expected, atol=1e-4, rtol=0)


def test_convolutions_in_three(fresh: Make, tmp_path: Path) -> None:
    """LyCORIS' Tucker form: down 1x1, mid 3x3, up 1x1."""
    name = "lora_unet_mid_block_resnets_0_conv1"
    torch.manual_seed(0)
    down, mid, up = torch.randn(2, 32, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(32, 2, 1, 1)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    save_file({**state, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "tucker.safetensors")
    convert_lora(tmp_path / "tucker.safetensors", tmp_path / "plain.safetensors", "kohya")
    plain = load_file(tmp_path / "plain.safetensors")
    pixels = torch.randn(1, 32, 5, 5)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(pixels, down), mid, padding=1), up)
    got = conv(conv(pixels, plain[f"{name}.lora_down.weight"], padding=1), plain[f"{name}.lora_up.weight"])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_written_whole_and_never_over_others(fresh: Make, tmp_path: Path) -> None:
    source = sd_scripts_lora(fresh()[0], tmp_path / "source.safetensors")
    content = source.read_bytes()
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    with pytest.raises(FileExistsError, match=r"taken.safetensors is there already"):
        convert_lora(source, taken, "diffusers")
    with pytest.raises(FileExistsError):
        convert_lora(source, source, "kohya")
    (tmp_path / "peft/unet").mkdir(parents=True)
    (tmp_path / "peft/unet/adapter_config.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"adapter_config\.json"):
        convert_lora(source, tmp_path / "peft", "peft")
    assert (taken.read_text(), source.read_bytes()) == ("mine", content)
    assert [path.name for path in (tmp_path / "peft").rglob("*")] == ["unet", "adapter_config.json"]
    convert_lora(source, taken, "diffusers", overwrite=True)
    assert load_file(taken)
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize(
    ("to", "target", "message"),
    [
        ("flux", "x.safetensors", "unknown LoRA format 'flux'; choose from diffusers, peft, kohya"),
        ("kohya", "x", "ends in .safetensors"),
        ("peft", "x.safetensors", "is a folder"),
    ],
)
def test_wrong_targets(fresh: Make, tmp_path: Path, to: Any, target: str, message: str) -> None:
    source = sd_scripts_lora(fresh()[0], tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_lora(source, tmp_path / target, to)
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_lora(tmp_path / "owner/name", tmp_path / "y.safetensors", "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


A, B = torch.zeros(2, 16), torch.ones(16, 2)
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
BROKEN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no up": ({f"{LAYER}.lora_down.weight": A}, "no up"),
    "ranks differ": ({f"{LAYER}.lora_down.weight": A, f"{LAYER}.lora_up.weight": torch.ones(16, 3)}, "do not fit each"),
    "nan": ({f"{LAYER}.lora_down.weight": A * math.nan, f"{LAYER}.lora_up.weight": B}, "not finite"),
    "infinite alpha": (
        {f"{LAYER}.lora_down.weight": A, f"{LAYER}.lora_up.weight": B, f"{LAYER}.alpha": torch.tensor(math.inf)},
        "the alpha part of this layer has values that are not finite",
    ),
    "many alphas": (
        {f"{LAYER}.lora_down.weight": A, f"{LAYER}.lora_up.weight": B, f"{LAYER}.alpha": torch.ones(3)},
        "must be one number",
    ),
    "whole numbers": ({f"{LAYER}.lora_down.weight": A.int(), f"{LAYER}.lora_up.weight": B.int()}, "no matrix of a"),
    "one number": ({f"{LAYER}.lora_down.weight": A[0, 0], f"{LAYER}.lora_up.weight": B}, "no matrix of a LoRA"),
    "LoHa": ({f"{LAYER}.hada_w1_a": A}, "LoHa"),
    "LoKr": ({"unet.mid_block.attentions.0.proj_in.lokr_w1": A}, "LoKr"),
    "a whole model": ({"unet.conv_in.weight": A}, "are not LoRA"),
    "no tensors": ({}, "no tensors"),
    "unknown layer": (
        {"lora_unet_wings_0.lora_down.weight": A, "lora_unet_wings_0.lora_up.weight": B},
        "none of|no LoRA",
    ),
    "of the second encoder": (
        {"lora_te2_x.lora_down.weight": A, "lora_te2_x.lora_up.weight": B},
        "none of|no LoRA",
    ),
    "twice": (
        {
            "unet.conv_in.lora_A.weight": A,
            "unet.conv_in.lora_B.weight": B,
            "unet.conv_in.lora.down.weight": A.clone(),
        },
        "both the down part",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused(fresh: Make, tmp_path: Path, kind: str) -> None:
    state, message = BROKEN[kind]
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_lora(tmp_path / "broken.safetensors", tmp_path / "new.safetensors", "diffusers")
    ours = fresh()[0]
    with pytest.raises(ValueError, match=message):
        ours.load_lora_weights(tmp_path / "broken.safetensors")
    assert ours.get_list_adapters() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"unet.lora_alpha": "x"}', "config is damaged"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "config is damaged"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(.*.*)*x": 2}}', "too involved"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}', "config is damaged"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_broken_configs_are_refused(fresh: Make, tmp_path: Path, config: str, message: str) -> None:
    file = diffusers_lora(fresh()[0], tmp_path, text=False)
    save_file(load_file(file), file, {"lora_adapter_metadata": config})
    with pytest.raises(ValueError, match=message):
        convert_lora(file, tmp_path / "new.safetensors", "kohya")
    assert not (tmp_path / "new.safetensors").exists()


def test_what_a_format_cannot_hold_is_not_lost_silently(fresh: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = fresh()[0]
    state, config = lora_weights(ours.unet, ATTENTION, lora_bias=True)
    type(ours).save_lora_weights(tmp_path / "bias", unet_lora_layers=state, unet_lora_adapter_metadata=config)
    with pytest.raises(ValueError, match="has a bias, which kohya's format cannot hold"):
        convert_lora(tmp_path / "bias", tmp_path / "x.safetensors", "kohya")
    expected = drawn(fresh, tmp_path / "bias")
    convert_lora(tmp_path / "bias", tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["lora_bias"] is True
    torch.testing.assert_close(drawn(fresh, tmp_path / "peft"), expected)
