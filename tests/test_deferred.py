"""Imports put off: what is taken of a module is loaded when it is used, and is then the module's own."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny import tiny_pipeline

from latentdiff import TextToImagePipeline, deferred
from latentdiff.deferred import Deferred, StandIn, imports_deferred

WHOLE = """
from heavy.parts import Part
__version__ = "2"
numbers = [1, 2]
table = {"one": 1}
def double(number): return 2 * number
"""


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package ``heavy`` with a module ``heavy.parts``, and ``taker``, which takes of both."""
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text(WHOLE)
    (tmp_path / "heavy" / "parts.py").write_text("class Part:\n    size = 3\n")
    taken = "import heavy.parts\nfrom heavy import double, numbers, table\nfrom heavy.parts import Part\n"
    (tmp_path / "taker.py").write_text(f"{taken}def make(one: Part | None = None) -> None: ...\n")
    (tmp_path / "derived.py").write_text("from heavy.parts import Part\nclass Smaller(Part): size = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("heavy", "heavy.parts", "taker", "derived"):
        sys.modules.pop(name, None)


def take(name: str = "taker") -> Any:
    with imports_deferred(["heavy"]):
        return importlib.import_module(name)


@pytest.mark.usefixtures("heavy")
def test_what_is_only_taken_is_not_loaded() -> None:
    taker = take()
    assert isinstance(taker.double, Deferred)
    assert not isinstance(3, taker.Part)  # of a class that was never loaded there is nothing
    union = dict | taker.Part | None
    assert isinstance({}, union)
    assert isinstance(None, union)
    assert not isinstance(3, union)
    assert not {"heavy", "heavy.parts"} & sys.modules.keys()


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("while_deferred", [True, False])
def test_what_is_used_is_the_modules_own(while_deferred: bool) -> None:
    with imports_deferred(["heavy"] if while_deferred else []):
        taker = take()
        assert taker.double(4) == 8
        heavy = importlib.import_module("heavy")
        assert not isinstance(heavy, StandIn)
        assert taker.table["one"] == 1
        assert 2 in taker.numbers
        assert list(taker.numbers) == [1, 2]
        assert taker.Part.__name__ == "Part"
        assert taker.heavy.__version__ == "2"
        assert taker.Part.size == taker.heavy.parts.Part.size == 3
        assert isinstance(taker.Part(), heavy.Part)
        assert isinstance(heavy.Part(), taker.Part)


@pytest.mark.usefixtures("heavy")
def test_a_class_that_is_derived_from_loads_at_once() -> None:
    derived = take("derived")
    heavy = importlib.import_module("heavy")
    assert derived.Smaller.__mro__[1] is heavy.Part


@pytest.mark.usefixtures("heavy")
def test_afterwards_and_where_the_module_is_loaded_imports_are_as_always() -> None:
    take()
    heavy = importlib.import_module("heavy")
    assert heavy.double(1) == 2
    with imports_deferred(["heavy"]):
        assert importlib.import_module("heavy") is heavy
    del sys.modules["heavy"], sys.modules["heavy.parts"]
    with imports_deferred(["heavy"], unless="pytest"):
        assert not isinstance(importlib.import_module("heavy"), StandIn)


@pytest.mark.usefixtures("heavy")
def test_what_is_not_there_is_not_found() -> None:
    with imports_deferred(["heavy", "heavier"]):
        assert importlib.util.find_spec("heavier") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("heavy.nothing")
        nothing = importlib.import_module("heavy").nothing
    with pytest.raises(ImportError, match="nothing"):
        nothing()


@pytest.mark.slow
def test_a_program_of_its_own_draws_as_always(tmp_path: Path) -> None:
    """It puts imports off; of what is put off, LoRAs need peft, and this scheduler scipy."""
    pipeline = tiny_pipeline("clip")
    pipeline.scheduler = DPMSolverMultistepScheduler(use_beta_sigmas=True)
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    TextToImagePipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipeline.unet))
    style = tmp_path / "pytorch_lora_weights.safetensors"
    command = [sys.executable, "-m", "latentdiff", "generate", "a cup", "-m", "model", "--lora", style.name]
    command += ["--steps", "2", "--seed", "3", "-o", "cup.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)

    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "model")
    pipeline.load_lora_weights(style)
    expected = pipeline("a cup", num_inference_steps=2, seed=3).images[0]
    with Image.open(tmp_path / "cup.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(expected)).all()


def test_versions_whose_imports_were_not_tried_import_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {name: version(name) for name in deferred.TRIED}
    monkeypatch.setattr(deferred, "TRIED", {name: (there.rpartition(".")[0],) for name, there in here.items()})
    assert deferred.is_tried()
    monkeypatch.setitem(deferred.TRIED, "diffusers", ("0.1", "0.42000"))
    assert not deferred.is_tried()
