"""Files of adapters as others write them, and some that were made to do harm."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loras import ATTENTION, CLIP, diffusers_lora, lora_weights
from safetensors.torch import load_file, save_file
from tiny import draw, tiny_pipeline

from latentdiff.interchange.embeddings import convert_embedding
from latentdiff.interchange.lora.formats import convert_lora


def peft_wrapped(pipeline: Any, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """The state of PEFT's models around the networks, with the names of LoRA's layers only."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    states = {}
    for part, targets in (("unet", ATTENTION), ("text_encoder", CLIP)):
        model = get_peft_model(getattr(pipeline, part), LoraConfig(r=3, lora_alpha=3, target_modules=targets), name)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        states[part] = {key: value for key, value in model.state_dict().items() if ".lora_" in key}
    return states


@pytest.mark.parametrize("name", ["default", "style"])
@pytest.mark.parametrize("form", ["raw", "with networks", "networks first", "two files", "folders"])
def test_pefts_own_keys(tmp_path: Path, name: str, form: str) -> None:
    reference, pipeline = tiny_pipeline("clip"), tiny_pipeline("clip")
    states = peft_wrapped(reference, name)  # which puts the LoRAs into its networks
    expected = draw(reference)
    raw = next(iter(states["unet"]))
    assert raw.startswith("base_model.model.")
    assert raw.endswith(f"lora_A.{name}.weight")
    wrapper = "base_model.model."
    loads: list[Any] = list(states.values())
    if form == "with networks":
        pairs = [(part, key, value) for part, state in states.items() for key, value in state.items()]
        loads = [{key.replace(wrapper, f"{wrapper}{part}."): value for part, key, value in pairs}]
    elif form == "networks first":
        loads = [{f"{part}.{key}": value for part, state in states.items() for key, value in state.items()}]
    elif form == "two files":
        for part, state in states.items():
            save_file(state, tmp_path / f"{part}.safetensors")
        loads = [tmp_path / "unet.safetensors", tmp_path / "text_encoder.safetensors"]
    elif form == "folders":
        for part, state in states.items():
            (tmp_path / part).mkdir()
            save_file(state, tmp_path / part / "adapter_model.safetensors")
            (tmp_path / part / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, "r": 3}))
        loads = [tmp_path]
    names = [pipeline.load_lora_weights(source).adapter_name for source in loads]
    pipeline.set_adapters(names)
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-4, rtol=0)


def test_two_adapters_in_one_file() -> None:
    pipeline = tiny_pipeline("clip")
    one = peft_wrapped(tiny_pipeline("clip"), "one")["unet"]
    both = one | {key.replace(".one.", ".two."): value for key, value in one.items()}
    with pytest.raises(ValueError, match="several adapters in it"):
        pipeline.load_lora_weights(both)


PATTERNS = {
    "nested": {"(.*.*)*x": 2},
    "nested in a group": {"(?:(?:a*)*)*$": 2},
    "counted": {"(.{1,9}){1,9}x": 2},
    "too many of one": {"a{4294967296}": 2},
    "long": {"(a|b)" * 200: 2},
    "many": {f"(to_{i}|x)": 2 for i in range(1000)},
    "very many": {f"layer.{i}": 2 for i in range(200_000)},
    "deep": {"(" * 5000 + ")" * 5000: 2},
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_that_take_long_are_refused(tmp_path: Path, kind: str) -> None:
    file = diffusers_lora(tiny_pipeline("clip"), tmp_path, text=False)
    config = {"unet.r": 3, "unet.lora_alpha": 3, "unet.alpha_pattern": PATTERNS[kind]}
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(config)})
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"config is damaged: .*(too involved|the limits are)"):
        convert_lora(file, tmp_path / "new.safetensors", "kohya")
    assert time.perf_counter() - start < 5
    assert not (tmp_path / "new.safetensors").exists()


def test_patterns_of_adapter_config_are_checked_too(tmp_path: Path) -> None:
    state, _ = lora_weights(tiny_pipeline("clip").unet, ATTENTION)
    save_file(
        {f"base_model.model.{key}": value for key, value in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": PATTERNS["nested"], "target_modules": "(.*)*x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="too involved"):
        tiny_pipeline("clip").load_lora_weights(tmp_path)


def test_ordinary_patterns_are_as_in_peft(tmp_path: Path) -> None:
    ours = tiny_pipeline("clip")
    patterns = {"^mid_block.*to_q": 1, "attn1.to_k": 2, r"to_(v|out\.0)": 3}
    state, config = lora_weights(ours.unet, ATTENTION, alpha_pattern=patterns, rank=4, alpha=4)
    type(ours).save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config)
    ours.load_lora_weights(tmp_path)
    scales = {
        name: module.scaling["default_0"] for name, module in ours.unet.named_modules() if hasattr(module, "lora_A")
    }
    assert len(scales) > 8
    for name, scale in scales.items():
        first = name.startswith("mid_block") and name.endswith("to_q")
        expected = 1 if first else 2 if name.endswith("attn1.to_k") else 3 if name.endswith(("to_v", "to_out.0")) else 4
        assert scale == expected / 4, name


@pytest.mark.parametrize("link", ["file", "config", "subfolder"])
def test_links_out_of_an_adapters_folder_are_refused(tmp_path: Path, link: str) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "lora"
    file = diffusers_lora(tiny_pipeline("clip"), outside, text=False)
    (outside / "adapter_config.json").write_text("{}")
    folder.mkdir()
    if link == "subfolder":
        (folder / "inner").symlink_to(outside)
    else:
        os.link(file, folder / "pytorch_lora_weights.safetensors") if link == "config" else None
        name = "adapter_config.json" if link == "config" else "pytorch_lora_weights.safetensors"
        (folder / name).symlink_to(outside / name)
    with pytest.raises(ValueError, match=r"is a link that leads out of \S+/lora, to \S+/outside/"):
        tiny_pipeline("clip").load_lora_weights(folder, **({"subfolder": "inner"} if link == "subfolder" else {}))
    named = tmp_path / "named.safetensors"
    named.symlink_to(file)  # the user names it
    tiny_pipeline("clip").load_lora_weights(named)


def test_a_pickle_with_numpy_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"<cup>": np.zeros((2, 16), dtype=np.float32)}, tmp_path / "cup.pt")
    with pytest.raises(ValueError, match=r"cup.pt holds more than tensors.*numpy.*as .safetensors") as raised:
        tiny_pipeline("clip").load_textual_inversion(tmp_path / "cup.pt", allow_pickle=True)
    assert "weights_only" not in str(raised.value)
    assert "safe_globals" not in str(raised.value)


@pytest.mark.parametrize("how", ["loaded", "converted"])
def test_a_strided_tensor_that_claims_gigabytes(tmp_path: Path, how: str) -> None:
    torch.save({"string_to_param": {"*": torch.zeros(1).expand(150_000_000, 16)}}, tmp_path / "cup.pt")
    assert (tmp_path / "cup.pt").stat().st_size < 10_000
    read = {
        "loaded": lambda: tiny_pipeline("clip").load_textual_inversion(tmp_path / "cup.pt", allow_pickle=True),
        "converted": lambda: convert_embedding(tmp_path / "cup.pt", tmp_path / "cup.safetensors", True),
    }
    with pytest.raises(ValueError, match=r"has 2400000000 values; a word has a few vectors"):
        read[how]()
    assert [path.name for path in tmp_path.iterdir()] == ["cup.pt"]
