"""LoHa and LoKr as LoRAs: PEFT's own differences of weights, to rounding; LyCORIS's files; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import draw, tiny_pipeline
from torch import Tensor, nn

from latentdiff.interchange.lora.formats import convert_lora
from latentdiff.interchange.lora.layers import read_layers
from latentdiff.training.trainers.lora import lycoris_tensors


class Layers(nn.Module):
    """Under the names of a UNet's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nn.ModuleDict({"wide": nn.Linear(24, 40), "narrow": nn.Linear(40, 24)})])
        self.conv1 = nn.Conv2d(8, 12, 3)
        self.conv2 = nn.Conv2d(12, 8, 1)


KINDS: dict[str, Any] = {
    "loha": lambda rank: LoHaConfig(r=rank, alpha=6, rank_pattern={"conv1": 2}),
    "loha-tucker": lambda rank: LoHaConfig(r=rank, alpha=6, use_effective_conv2d=True),
    "lokr": lambda rank: LoKrConfig(r=rank, alpha=6, alpha_pattern={"narrow": 5}),
    "lokr-both": lambda rank: LoKrConfig(r=rank, alpha=6, decompose_both=True, use_effective_conv2d=True),
}


@pytest.mark.parametrize("rank", [2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_the_lora_makes_the_same_difference(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    network, config = Layers(), KINDS[kind](rank)
    config.target_modules = ["wide", "narrow", "conv1", "conv2"]
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if ".hada_" in name or ".lokr_" in name:
            nn.init.normal_(parameter)
    state = {f"unet.{key}": tensor for key, tensor in get_peft_model_state_dict(network).items()}
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    own = {"r": rank, "lora_alpha": config.alpha, **patterns}
    found, others = read_layers(state, {f"unet.{key}": value for key, value in own.items()})
    assert not others
    assert len(found) == 4
    for name, layer in found.items():
        adapted: Any = network.get_submodule(name.removeprefix("unet."))
        wanted: Tensor = adapted.get_delta_weight("default")
        delta = layer.scale * torch.einsum("or,ri->oi", layer.up.flatten(1), layer.down.flatten(1))
        torch.testing.assert_close(delta.reshape(wanted.shape), wanted, atol=1e-4, rtol=1e-4)
        assert layer.rank <= min(wanted.flatten(1).shape)


def attention_file(folder: Path, *, convolution: bool = False) -> tuple[Any, Path, Any]:
    """A pipeline with a random LoKr in its UNet, its LyCORIS file, and what it draws."""
    pipeline = tiny_pipeline("clip")
    targets = ["to_q", "to_v", *(["conv1"] if convolution else [])]
    config = LoKrConfig(r=2, alpha=3, target_modules=targets, init_weights=False)
    torch.manual_seed(3)
    pipeline.unet.add_adapter(config)
    state = get_peft_model_state_dict(pipeline.unet)
    file = folder / "lokr.safetensors"
    save_file(lycoris_tensors({f"unet.{key}": one for key, one in state.items()}, config), file)
    return pipeline, file, draw(pipeline)


def test_a_file_of_lycoris_draws_alike_and_becomes_a_lora(tmp_path: Path) -> None:
    _, file, expected = attention_file(tmp_path)
    assert all(key.startswith("lora_unet_") for key in load_file(file))
    convert_lora(file, tmp_path / "diffusers.safetensors", "diffusers")
    for place in (file, tmp_path / "diffusers.safetensors"):
        plain = tiny_pipeline("clip")
        before = draw(plain)
        assert not plain.load_lora_weights(place).unmatched
        torch.testing.assert_close(draw(plain), expected, atol=1e-4, rtol=0)
        assert (expected - before).abs().max() > 0.01
        plain.set_adapters("default_0", 0.0)
        torch.testing.assert_close(draw(plain), before, atol=1e-5, rtol=0)


def test_only_its_network_tells_the_kernel_of_a_convolution(tmp_path: Path) -> None:
    state = {f"lora_unet_down_blocks_0_resnets_0_conv1.hada_w{i}_a": torch.randn(8, 2) for i in (1, 2)}
    state |= {f"lora_unet_down_blocks_0_resnets_0_conv1.hada_w{i}_b": torch.randn(2, 72) for i in (1, 2)}
    save_file(state, tmp_path / "loha.safetensors")
    with pytest.raises(ValueError, match="does not say whether this is a convolution"):
        convert_lora(tmp_path / "loha.safetensors", tmp_path / "new.safetensors", "diffusers")
    pipeline = tiny_pipeline("clip")
    layer = pipeline.unet.down_blocks[0].resnets[0].conv1
    weight = layer.weight.detach().clone()
    pipeline.load_lora_weights(tmp_path / "loha.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    one, two = (
        state[f"lora_unet_down_blocks_0_resnets_0_conv1.hada_w{i}_a"]
        @ state[f"lora_unet_down_blocks_0_resnets_0_conv1.hada_w{i}_b"]
        for i in (1, 2)
    )
    found = pipeline.unet.down_blocks[0].resnets[0].conv1.weight
    torch.testing.assert_close(found.detach(), weight + (one * two).reshape(weight.shape), atol=1e-5, rtol=1e-5)


FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "a part is missing": ({"hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 4)}, "LoHa has no hada_w2_a"),
    "no second factor": ({"lokr_w1": torch.ones(2, 2)}, "LoKr has no lokr_w2_a"),
    "other sides": (
        {"hada_w1_a": torch.ones(4, 2), "hada_w1_b": torch.ones(2, 4), "hada_w2_a": torch.ones(5, 2)}
        | {"hada_w2_b": torch.ones(2, 4)},
        "do not fit each other",
    ),
    "too large": (
        {"lokr_w1_a": torch.ones(9000, 1), "lokr_w1_b": torch.ones(1, 9000), "lokr_w2": torch.ones(1, 1)},
        "more than 67,108,864 numbers",
    ),
    "a product too large": ({"lokr_w1": torch.ones(99, 99), "lokr_w2": torch.ones(99, 99)}, "numbers in the weight"),
    "not a number": ({"lokr_w1": torch.full((2, 2), torch.nan), "lokr_w2": torch.ones(2, 2)}, "not finite"),
    "no matrix": ({"lokr_w1": torch.ones(2), "lokr_w2": torch.ones(2, 2)}, "do not fit|needs matrices"),
    "oft": ({"oft_blocks": torch.ones(2, 2, 2)}, "it holds OFT"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_broken_files_are_refused(tmp_path: Path, kind: str) -> None:
    parts, message = WRONG[kind]
    save_file({f"{FLAT}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_lora(tmp_path / "wrong.safetensors", tmp_path / "new.safetensors", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]
