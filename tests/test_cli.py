"""The command line, in this process, with a tiny model of random weights."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from program import run_program
from torch._utils import ExceptionWrapper
from transformers import BertConfig, BertModel, BertTokenizer

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel, __version__, cli
from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.fingerprint import model_digest
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines.commands import generate

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "car", "sun"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    pipeline = TextToImagePipeline(
        vae=AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)),
        text_encoder=BertModel(config),
        tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=8),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipeline.register_defaults(num_inference_steps=2, guidance_scale=3.0)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTDIFF_DEBUG", "0")


def test_draws_a_picture_that_keeps_its_settings(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(monkeypatch, "generate", "a red car", "-o", "car.png", "--model", model, "--seed", "5") == 0
    assert re.search(r"car\.png: seed 5, \d", capsys.readouterr().out)
    settings = read_settings(Path("car.png"))
    assert settings == {
        "prompts": ["a red car"],
        "count": 1,
        "seed": 5,
        "negative_prompt": None,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "model": model,
        "model_digest": model_digest(Path(model)),
        "scheduler": "DDIMScheduler",
        "precision": "float32",
        "width": 8,
        "height": 8,
        "version": __version__,
        "batches": [{"prompts": ["a red car"], "seeds": [5]}],
        "pictures": [[0, 0]],
        "machine": {
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "processor": ANY,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    drawn = TextToImagePipeline.from_pretrained(model)("a red car", seed=5).images[0]
    with Image.open("car.png") as image:
        assert image.tobytes() == drawn.tobytes()
    assert run_program(monkeypatch, "generate", "a red car", "-o", "car.png", "--model", model) == 0  # again


def test_options_reach_the_picture(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--steps", "3", "--guidance", "2", "--scheduler", "euler", "--precision", "bfloat16", "--device", "cpu"]
    size = ["--width", "16", "--height", "12", "--negative-prompt", "blue"]
    assert run_program(monkeypatch, "generate", "a red car", "--model", model, *options, *size) == 0
    settings = read_settings(Path("a-red-car.png")) or {}
    expected: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "scheduler": "EulerDiscreteScheduler"}
    expected |= {"precision": "bfloat16", "width": 16, "height": 12, "negative_prompt": "blue"}
    assert {key: settings[key] for key in expected} == expected
    with Image.open("a-red-car.png") as image:
        assert image.size == (16, 12)


def test_several_pictures_make_a_grid_or_several_files(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", model, "--seed", "7"]
    assert run_program(monkeypatch, "generate", "a car", "sun", "-n", "5", "-o", "grid.png", *common) == 0
    assert "seeds 7 to 16" in capsys.readouterr().out
    with Image.open("grid.png") as grid:
        assert grid.size == (5 * 10 - 2, 2 * 10 - 2)
        ninth = grid.crop((30, 10, 38, 18))
    assert run_program(monkeypatch, "generate", "a car", "sun", "-n", "5", "-o", "one.png", "--separate", *common) == 0
    files = sorted(path.name for path in Path().glob("one-*.png"))
    assert files == [f"one-{i:02d}.png" for i in range(1, 11)]
    settings = read_settings(Path("one-09.png")) or {}
    assert (settings["prompts"], settings["seed"], settings["count"]) == (["sun"], 15, 1)
    with Image.open("one-09.png") as image:
        assert image.tobytes() == ninth.tobytes()
    assert run_program(monkeypatch, "generate", "sun", "-o", "again.png", "--model", model, "--seed", "15") == 0
    with Image.open("again.png") as image, Image.open("one-09.png") as before:
        assert max(abs(a - b) for a, b in zip(image.tobytes(), before.tobytes(), strict=True)) <= 1


MISTAKES: list[tuple[list[str], str]] = [
    (["  "], "the prompt is empty"),
    (["a", "--height", "0"], "option height: it must be greater than 0 (got 0)"),
    (["a", "--scheduler", "magic"], "unknown scheduler 'magic'; the schedulers are ddim, "),
    (["a", "--model", "no/such/folder"], "no/such/folder: no such folder"),
    (["a", "--steps", "2000"], "num_inference_steps must lie in [1, 1000], not 2000"),
    (["a", "-o", "car.jpg"], "name it car.png"),
    (["a", "-o", "mine.png"], "mine.png exists and was not drawn by latentdiff"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_told_without_a_traceback(
    arguments: list[str],
    message: str,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.png").write_text("precious")
    given = [] if "--model" in arguments else ["--model", model]
    assert run_program(monkeypatch, "generate", *arguments, *given) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert "Traceback" not in error
    assert Path("mine.png").read_text() == "precious"
    assert [path.name for path in Path().iterdir()] == ["mine.png"]


@pytest.mark.parametrize("arguments", [[], ["a", "--count", "0"], ["a", "--nonsense"], ["a", "--precision", "int3"]])
def test_wrong_usage(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(monkeypatch, "generate", *arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_a_damaged_model_is_named(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run_program(monkeypatch, "generate", "a", "--model", "broken") == 2
    error = capsys.readouterr().err
    assert "diffusion_pytorch_model.safetensors is damaged" in error
    assert "Traceback" not in error


def test_our_own_faults_have_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(generate, "load_pipeline", fail)
    assert run_program(monkeypatch, "generate", "a") == 1
    assert "Error: RuntimeError: broken" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="broken"):
        run_program(monkeypatch, "--debug", "generate", "a")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device"), 2, "the disk is full: [Errno 28] No space left on device: 'car.png'"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            2,
            "No space left on device: 'car.png'; make",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "not enough memory: CUDA out of memory."),
        (MemoryError(), 2, "there is not enough memory: MemoryError; ask for fewer"),
        (ImportError("this needs x; install with: pip install x"), 2, "Error: this needs x; install with"),
        (ImportError("No module named 'x'", name="x"), 1, "Error: ImportError: No module named 'x'\n"),
        (FloatingPointError("the loss is nan at step 3"), 2, "Error: the loss is nan at step 3\n"),
        (KeyError("x"), 1, "Error: KeyError: 'x'\nThis may be a fault of the program"),
    ],
)
def test_what_the_user_can_mend_is_no_fault_of_the_program(
    error: Exception, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        with atomic_file(Path("car.png")):
            raise error

    monkeypatch.setattr(generate, "load_pipeline", fail)
    assert run_program(monkeypatch, "generate", "a") == status
    said = capsys.readouterr().err
    assert message in said
    assert ("fault of the program" in said) == (status == 1)
    assert list(Path().iterdir()) == []


def test_unquoted_words_are_pointed_out(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(monkeypatch, "generate", "red", "car", "--model", model) == 0
    assert 'write "red car"' in capsys.readouterr().out


def test_the_installed_command() -> None:
    run = subprocess.run([sys.executable, "-m", "latentdiff", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    for command in ("generate", "replay", "many", "convert", "train", "finetune", "doctor", "evaluate", "likelihood"):
        assert f" {command} " in run.stdout
    version = subprocess.run([sys.executable, "-m", "latentdiff.cli", "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("latentdiff ")


@pytest.mark.slow
def test_from_a_cold_start(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latentdiff", "generate", "a red car", "-o", "car.png", "--model", model]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    with Image.open(tmp_path / "car.png") as image:
        assert json.loads(image.text["latentdiff"])["prompts"] == ["a red car"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EFBIG, "File too large", "a.png"), RuntimeError("I/O error: File too large (os error 27) a.png")],
)
def test_a_file_that_may_not_be_so_large(error: Exception) -> None:
    text, mistake = cli.explain(error)
    assert mistake
    assert text.startswith(("File too large: 'a.png': a file of this", "I/O error"))
    assert "ulimit -f" in text


def test_an_error_of_a_process_that_reads_ahead_is_said_as_any_other() -> None:
    try:
        raise ValueError("a.png: cannot be read\n  and more") from OSError("no such file")
    except ValueError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(ValueError, match="Original OSError") as caught:
        wrapped.reraise()
    assert cli.explain(caught.value) == ("a.png: cannot be read\n  and more", True)
