"""Checkpoint files: names, headers, and pickles that are read and that are not."""

import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentdiff.interchange.single_file import Checkpoint, OriginalSettings


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight"], "first_stage_model.encoder.conv_in.weight"),
        (["input_blocks.0.0.weight"], "model.diffusion_model.input_blocks.0.0.weight"),
        (["encoder.conv_in.weight", "encoder.down_blocks.0.x"], "encoder.conv_in.weight"),  # diffusers' own names
        (
            ["cond_stage_model.transformer.embeddings.token_embedding.weight"],
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        ),
    ],
)
def test_names_without_their_beginning_get_it(tmp_path: Path, names: list[str], first: str) -> None:
    save_file({name: torch.full((2,), float(i)) for i, name in enumerate(names)}, tmp_path / "a.safetensors")
    weights = Checkpoint(tmp_path / "a.safetensors")
    assert first in weights
    assert torch.equal(weights[first], torch.zeros(2))
    assert (len(weights), weights.shape(first)) == (len(names), (2,))


@pytest.mark.parametrize("header", ["not json", "[1]", '{"unet": 3}', "[" * 100_000])
def test_a_damaged_header_is_told(tmp_path: Path, header: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"latentdiff": header})
    with pytest.raises(ValueError, match=r"a.safetensors: its header"):
        Checkpoint(tmp_path / "a.safetensors")


def test_some_averages_are_not_enough(tmp_path: Path) -> None:
    names = [
        "model.diffusion_model.out.0.bias",
        "model.diffusion_model.out.2.bias",
        "model_ema.diffusion_modelout0bias",
    ]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"model.diffusion_model.out.2.bias has none"):
        Checkpoint(tmp_path / "a.safetensors", ema=True)


@pytest.fixture
def trainer() -> Iterator[type]:
    """The class that the first released checkpoints name, which is not to be imported."""
    kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    made = []
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", kind.__module__):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            made.append(name)
    sys.modules[kind.__module__].ModelCheckpoint = kind  # type: ignore[attr-defined]
    yield kind
    for name in made:
        del sys.modules[name]


@pytest.mark.parametrize("new", [True, False])
def test_a_trainers_own_objects_are_passed_over(tmp_path: Path, trainer: type, new: bool) -> None:
    content = {
        "state_dict": {"a": torch.arange(3.0), "b": 5},
        "global_step": 875000,
        "callbacks": {trainer: {"best_model_score": np.float64(0.5), "own": trainer()}},
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    weights = Checkpoint(tmp_path / "a.ckpt", allow_pickle=True)
    assert (list(weights), weights.global_step) == (["a"], 875000)
    assert torch.equal(weights["a"], torch.arange(3.0))


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, how: Any, mark: Path) -> None:
        self.how, self.mark = how, mark

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how, (str(self.mark),)


@pytest.mark.parametrize("how", [os.mkdir, os.system, eval, exec, Path, __import__, getattr])
@pytest.mark.parametrize("new", [True, False])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, how: Any, new: bool) -> None:
    mark = tmp_path / "mark"
    evil = Runs(how, Path(f"mkdir {mark}") if how is os.system else mark)
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": evil}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"state_dict": evil}, 2))
    for name in ("a.ckpt", "b.pt"):
        with pytest.raises(ValueError, match=rf"{name} (holds more than tensors, .*nothing was run|is damaged)"):
            Checkpoint(tmp_path / name, allow_pickle=True)
    with pytest.raises(
        ValueError, match=rf"a.ckpt holds more than tensors, which could run code, .*it asks for \S*{how.__name__}\)"
    ):
        Checkpoint(tmp_path / "a.ckpt", allow_pickle=True)
    assert not mark.exists()


def test_damaged_pickles_are_told(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(100)}}, tmp_path / "good.ckpt")
    whole = (tmp_path / "good.ckpt").read_bytes()
    contents = (
        b"",
        b"PK",
        whole[: len(whole) // 2],
        whole[: len(whole) // 2] + whole[-200:],
        b"\x80\x02]q\x00.",
        b"x" * 99,
    )
    for content in contents:
        (tmp_path / "bad.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.ckpt"):
            Checkpoint(tmp_path / "bad.ckpt", allow_pickle=True)
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="there are no named tensors in it"):
        Checkpoint(tmp_path / "list.ckpt", allow_pickle=True)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"a checkpoint is a .safetensors file"):
        Checkpoint(tmp_path / "a.gguf", allow_pickle=True)


def test_a_yaml_file_leaves_out_what_the_original_code_has(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {target: os.system, params: {linear_start: 1e-3, beta_schedule: cosine}}")
    read = OriginalSettings.read(tmp_path / "a.yaml")
    assert read == OriginalSettings(
        prediction_type="epsilon",
        beta_schedule="squaredcos_cap_v2",
        beta_start=1e-3,
        beta_end=0.02,
        num_train_timesteps=1000,
        scaling_factor=1.0,
    )
    assert (read | OriginalSettings(prediction_type="sample", heads=4)).said() == {
        **read.said(),
        "prediction_type": "sample",
        "heads": 4,
    }


@pytest.mark.parametrize("value", ["true", "-3", ".nan", ".inf", "[1]", "1.5e10", "'1'*3"])
def test_numbers_that_are_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "a.yaml").write_text(f"model: {{params: {{scale_factor: {value}}}}}")
    with pytest.raises(ValueError, match=r"a.yaml: scale_factor=.* should be a number above 0|a.yaml, line 1: not"):
        OriginalSettings.read(tmp_path / "a.yaml")
