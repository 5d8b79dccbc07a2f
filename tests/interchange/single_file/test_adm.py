"""Networks of the released layout of ADM and its forerunners against the outputs of the released code.

``released_adm.json`` holds, of networks of openai/guided-diffusion with 32 channels in their first level (`CASES` says
what else they were built with), names and shapes of their weights and what they give for `weights` and `inputs`.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.models import NoisyClassifier, UNet2DModel

REFERENCE: dict[str, Any] = json.loads(Path(__file__).with_name("released_adm.json").read_text())
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adm": (UNet2DModel, {"head_channels": 16}),  # 1, 2, 2 times the channels, resnet blocks that halve, five classes
    "adm new order": (UNet2DModel, {"head_channels": 16, "heads_first": False}),
    "improved": (UNet2DModel, {"heads": 4}),  # two layers, 1, 1, 2 times the channels, learned variances
    "ddpm": (UNet2DModel, {}),
    "classifier attention": (NoisyClassifier, {"head_channels": 16}),
    "classifier adaptive": (NoisyClassifier, {"head_channels": 16}),
}


def weights(name: str) -> dict[str, Tensor]:
    found = {}
    for i, (key, shape) in enumerate(sorted(REFERENCE[name]["shapes"].items())):
        values = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + 1.3 * i)
        if len(shape) > 1:
            values = values * 2 / math.prod(shape[1:]) ** 0.5
        else:
            values = 0.3 * values + (1.0 if key.endswith("weight") else 0.0)
        found[key] = values.float().reshape(shape)
    return found


def inputs(name: str) -> list[Tensor]:
    sample = torch.sin(torch.arange(1, 193, dtype=torch.float64) * 1.7).float().reshape(1, 3, 8, 8)
    return [sample, torch.tensor([137]), *([torch.tensor([2])] if name == "adm" else [])]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_networks_give_what_the_released_code_gives(name: str, tmp_path: Path) -> None:
    kind, heads = CASES[name]
    save_file(weights(name), tmp_path / "model.safetensors")
    torch.save(weights(name), tmp_path / "model.pt")
    network = kind.from_single_file(tmp_path / "model.safetensors", **heads)
    output = network(*inputs(name))
    output = output if isinstance(output, Tensor) else output.sample
    wanted = torch.tensor(REFERENCE[name]["output"]).reshape(output.shape)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=2e-5)
    pickled = kind.from_single_file(tmp_path / "model.pt", allow_pickle=True, **heads)
    assert all(torch.equal(one, pickled.state_dict()[key]) for key, one in network.state_dict().items())
    network.save_pretrained(tmp_path / "folder")
    again = kind.from_pretrained(tmp_path / "folder")(*inputs(name))
    torch.testing.assert_close(again if isinstance(again, Tensor) else again.sample, output)


def test_heads_matter(tmp_path: Path) -> None:
    """Which the weights do not tell, so a wrong number goes unnoticed but for the output."""
    save_file(weights("adm"), tmp_path / "model.safetensors")
    for wrong in ({"head_channels": 8}, {"heads": 1}, {"head_channels": 16, "heads_first": False}):
        with torch.no_grad():
            found = UNet2DModel.from_single_file(tmp_path / "model.safetensors", **wrong)(*inputs("adm")).sample
        assert (found.flatten() - torch.tensor(REFERENCE["adm"]["output"])).abs().max() > 0.01
    with pytest.raises(ValueError, match="an attention has 64 channels, which head_channels=48 does not divide"):
        UNet2DModel.from_single_file(tmp_path / "model.safetensors", head_channels=48)


def test_what_is_no_such_network(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(weights("adm"), file)
    with pytest.raises(ValueError, match=r"holds a UNet \(UNet2DModel\)"):
        NoisyClassifier.from_single_file(file, head_channels=16)
    save_file(weights("classifier attention"), file)
    with pytest.raises(ValueError, match=r"holds a classifier \(NoisyClassifier\)"):
        UNet2DModel.from_single_file(file, head_channels=16)
    save_file({"something": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="no weights of the names"):
        UNet2DModel.from_single_file(file)
    lacking = weights("adm")
    del lacking["middle_block.0.in_layers.2.weight"]
    save_file(lacking, file)
    with pytest.raises(ValueError, match=r"are missing, such as middle_block\.0\.in_layers\.2\.weight"):
        UNet2DModel.from_single_file(file, head_channels=16)
    wide = weights("ddpm")
    wide["time_embed.0.weight"] = torch.zeros(128, 64)
    save_file(wide, file)
    with pytest.raises(ValueError, match="sinusoids are 64 wide and the first level 32"):
        UNet2DModel.from_single_file(file)
    with pytest.raises(TypeError, match="unknown argument 'head_width'"):
        UNet2DModel.from_single_file(file, head_width=64)
    with pytest.raises(FileNotFoundError):
        UNet2DModel.from_single_file(tmp_path / "none.safetensors")
