"""LoRAs of SDXL, of the UNet and both text encoders: in every format the pictures that diffusers draws with them."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from loras import diffusers_lora, sd_scripts_lora
from safetensors.torch import load_file, save_file
from tiny_sdxl import tiny_sdxl

from latentdiff import TextToImagePipeline
from latentdiff.interchange.lora.formats import convert_lora

CALL: dict[str, Any] = {"prompt": "a red car", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl().save_pretrained(folder)
    return folder


def both(sdxl: Path) -> tuple[Any, Any]:
    ours: Any = TextToImagePipeline.from_pretrained(sdxl)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    return ours, theirs


def drawn(pipeline: Any, **more: Any) -> torch.Tensor:
    return pipeline(**CALL, seed=0, output_type="pt", **more).images  # type: ignore[no-any-return]


def test_a_lora_of_three_networks_acts_as_in_diffusers_and_in_every_format(sdxl: Path, tmp_path: Path) -> None:
    ours, theirs = both(sdxl)
    source = diffusers_lora(theirs, tmp_path / "source")
    plain = drawn(ours)
    assert not ours.load_lora_weights(source).unmatched
    theirs.load_lora_weights(str(source))
    assert largest_difference(ours, theirs, **CALL) < 1e-4
    expected = drawn(ours)
    assert (expected - plain).abs().max() > 0.01
    for scale, wanted in ((0.0, plain), (1.0, expected)):
        torch.testing.assert_close(drawn(ours, cross_attention_kwargs={"scale": scale}), wanted, atol=1e-5, rtol=0)
    report = convert_lora(source, tmp_path / "kohya.safetensors", "kohya")
    assert report.layers.keys() == {"unet", "text_encoder", "text_encoder_2"}
    keys = load_file(tmp_path / "kohya.safetensors").keys()
    assert {key.split("_")[1] for key in keys} == {"unet", "te1", "te2"}
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "peft", "peft")
    assert (tmp_path / "peft" / "text_encoder_2" / "adapter_model.safetensors").is_file()
    convert_lora(tmp_path / "peft", tmp_path / "again", "diffusers")
    for place in ("kohya.safetensors", "peft", "again"):
        ours.unload_lora_weights()
        torch.testing.assert_close(drawn(ours), plain, atol=0, rtol=0)
        assert not ours.load_lora_weights(tmp_path / place).unmatched
        torch.testing.assert_close(drawn(ours), expected, atol=1e-5, rtol=0)
    theirs.unload_lora_weights()
    theirs.load_lora_weights(str(tmp_path / "again"))
    assert largest_difference(ours, theirs, **CALL) < 1e-4
    ours.fuse_lora()
    ours.unload_lora_weights()
    torch.testing.assert_close(drawn(ours), expected, atol=1e-4, rtol=0)


def test_kohyas_files_act_as_in_diffusers(sdxl: Path, tmp_path: Path) -> None:
    ours, theirs = both(sdxl)
    file = sd_scripts_lora(theirs, tmp_path / "kohya.safetensors")
    assert not ours.load_lora_weights(file).unmatched
    theirs.load_lora_weights(str(file))
    assert largest_difference(ours, theirs, **CALL) < 1e-4


def test_a_lora_that_does_not_fit_changes_nothing(sdxl: Path, tmp_path: Path, pipeline: Any) -> None:
    ours, theirs = both(sdxl)
    plain = drawn(ours)
    state = load_file(sd_scripts_lora(theirs, tmp_path / "kohya.safetensors"))
    key = next(key for key in state if key.startswith("lora_te2_") and key.endswith("lora_up.weight"))
    save_file({**state, key: state[key][:-1].contiguous()}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"short.safetensors.*text_encoder_2.*is made for a weight of shape"):
        ours.load_lora_weights(tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"is for another model"):
        ours.load_lora_weights(diffusers_lora(pipeline, tmp_path / "sd1", text=False))
    torch.testing.assert_close(drawn(ours), plain, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"clip_l": torch.zeros(1, 16)}, "it holds clip_l; SDXL's two text encoders need clip_l and clip_g"),
        ({"<x>": torch.zeros(1, 16)}, "it holds <x>; SDXL's"),
        ({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(2, 24)}, "clip_l has 1 vectors and clip_g 2"),
        ({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(1, 16)}, "this text encoder's are 24 wide"),
        ({"clip_l": torch.zeros(1, 16), "clip_g": torch.full((1, 24), torch.nan)}, "not finite"),
    ],
)
def test_words_that_do_not_fit_change_nothing(
    sdxl: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], why: str
) -> None:
    ours, _ = both(sdxl)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=why):
        ours.load_textual_inversion(tmp_path / "x.safetensors")
    assert len(ours.tokenizer) == len(ours.tokenizer_2) == 54
