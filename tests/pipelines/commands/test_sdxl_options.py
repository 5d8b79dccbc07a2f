"""What ``generate``, ``many`` and ``replay`` do with what only SDXL takes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sdxl import tiny_sdxl

from latentdiff import TextToImagePipeline
from latentdiff.interchange.png import read_settings

Run = Callable[..., int]

SAID = ["--original-size", "40", "32", "--crop", "3", "5", "--target-size", "16", "24", "--prompt-2", "sun"]
SAID += ["--negative-prompt", "", "--negative-prompt-2", "red", "--negative-original-size", "8", "9"]
CALL = {"original_size": (40, 32), "crops_coords_top_left": (3, 5), "target_size": (16, 24), "prompt_2": "sun"}
CALL |= {"negative_prompt": "", "negative_prompt_2": "red", "negative_original_size": (8, 9)}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    tiny_sdxl().save_pretrained(folder)
    return str(folder)


def test_sizes_and_second_prompts_are_drawn_with_recorded_and_replayed(sdxl: str, run: Run) -> None:
    assert run("generate", "a car", "--model", sdxl, "--steps", 2, "--seed", 1, *SAID, "-o", "car.png") == 0
    pipeline = TextToImagePipeline.from_pretrained(sdxl)
    wanted = pipeline("a car", num_inference_steps=2, seed=1, **CALL).images[0]
    with Image.open("car.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(wanted)).all()
    found = read_settings(Path("car.png")) or {}
    assert {name: found[name] for name in CALL} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in CALL.items()
    }
    assert run("replay", "car.png") == 0
    Path("prompts.txt").write_text("a car\n")
    assert run("many", "prompts.txt", "--model", sdxl, "--steps", 2, "--seed", 1, *SAID, "-o", "many") == 0
    with Image.open("many/000001.png") as drawn:
        assert (np.asarray(drawn) == np.asarray(wanted)).all()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--crop", "1", "2"], "--crop is for SDXL, and the model {model} is not; leave it out"),
        (["--negative-prompt-2", "x"], "--negative-prompt-2 is for SDXL"),
        (["--target-size", "0", "8"], "target_size: two numbers of pixels from 1 to 65536 are expected"),
    ],
)
def test_other_models_refuse_them(
    options: list[str], why: str, model: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "a car", "--model", model, *options, "-o", "car.png") != 0
    assert why.format(model=model) in " ".join(capsys.readouterr().err.split())
    Path("prompts.txt").write_text("a car\n")
    assert run("many", "prompts.txt", "--model", model, *options, "-o", "many") != 0
    assert not Path("car.png").exists()
    assert not Path("many").exists()
