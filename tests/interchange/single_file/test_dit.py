"""DiT's released layout against the outputs of the released code, see ``released_dit``."""

import argparse
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from released_dit import REFERENCE, inputs, weights
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.models import DiTTransformer2DModel


@torch.no_grad()
def test_it_gives_what_the_released_code_gives(tmp_path: Path) -> None:
    torch.testing.assert_close(
        weights()["pos_embed"].flatten()[::37], torch.tensor(REFERENCE["positions"]), atol=1e-6, rtol=0
    )
    save_file(weights(), tmp_path / "model.safetensors")
    network = DiTTransformer2DModel.from_single_file(tmp_path / "model.safetensors")
    output = network(*inputs()).sample
    wanted = torch.tensor(REFERENCE["output"]).reshape(output.shape)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=2e-5)
    # a checkpoint of the released training, of which the averages are taken
    others = {name: tensor + 1 for name, tensor in weights().items()}
    trained = {"model": others, "ema": weights(), "opt": {}, "args": argparse.Namespace(model="DiT-B/2")}
    torch.save(trained, tmp_path / "0050000.pt")
    pickled = DiTTransformer2DModel.from_single_file(tmp_path / "0050000.pt", allow_pickle=True)
    assert torch.equal(pickled(*inputs()).sample, output)
    network.save_pretrained(tmp_path / "folder")
    assert torch.equal(DiTTransformer2DModel.from_pretrained(tmp_path / "folder")(*inputs()).sample, output)
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "folder")  # whose frequencies are others
    assert 1e-4 < (theirs(*inputs()).sample - output).abs().max() < output.std()


def test_what_is_no_dit_or_not_whole_is_refused(tmp_path: Path) -> None:
    def read(file: str, changes: dict[str, Tensor | None], **options: Any) -> None:
        kept = {name: tensor for name, tensor in {**weights(), **changes}.items() if tensor is not None}
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, tmp_path / file)
        DiTTransformer2DModel.from_single_file(tmp_path / file, **options)

    name = "blocks.1.attn.qkv.weight"
    with pytest.raises(ValueError, match="no weights of the names of DiT's"):
        read("a.safetensors", {"pos_embed": None})
    with pytest.raises(ValueError, match=r"3 weights of the DiT are missing, such as blocks\.1\.attn\.qkv\.weight"):
        read("b.safetensors", {name: None})
    with pytest.raises(ValueError, match=r"blocks\.0\.more"):
        read("c.safetensors", {"blocks.0.more": torch.zeros(2)})
    with pytest.raises(ValueError, match="heads=3 does not divide"):
        read("d.safetensors", {}, heads=3)
    with pytest.raises(ValueError, match="of 15 places, no square"):
        read("e.safetensors", {"pos_embed": torch.zeros(1, 15, 128)})
    with pytest.raises(ValueError, match="not finite"):
        read("f.safetensors", {name: torch.full((384, 128), math.nan)})
