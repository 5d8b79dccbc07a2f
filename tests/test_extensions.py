"""Files outside the package, from the command line: kinds of pipeline, a conditioner, a process."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from latentdiff import cli
from latentdiff.extensions import VARIABLE, load_extensions
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines import registry

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs the program in a folder with docs/examples' files; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTDIFF_DEBUG", "0")
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(registry, "KINDS", [*registry.KINDS])
    for name in ("postcards.py", "second_encoder.py"):
        shutil.copy(EXAMPLES / name, name)

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["latentdiff", *map(str, arguments)])
        try:
            cli.run(cli.application())
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    yield run
    for name in ("postcards", "second_encoder", "flow"):
        sys.modules.pop(name, None)


def test_a_kind_of_pipeline_is_saved_loaded_drawn_from_and_replayed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    load_extensions(["postcards.py"])
    pipeline = registry.find_kind("PostcardPipeline").load()(**tiny_pipeline("clip").components)
    pipeline.register_defaults(num_inference_steps=2)
    pipeline.save_pretrained("model")
    options = ["a cup", "--model", "model", "--seed", "1", "-o", "cup.png"]
    assert run("--extension", "postcards.py", "generate", *options) == 0
    with Image.open("cup.png") as image:
        assert image.size == (16, 16)
        assert {image.convert("RGB").getpixel((x, 0)) for x in range(16)} == {(255, 255, 255)}
        assert image.convert("RGB").getpixel((8, 8)) != (255, 255, 255)
    assert (read_settings(Path("cup.png")) or {})["prompts"] == ["a cup"]
    assert run("replay", "cup.png") == 0  # the environment knows the extension by now
    assert "equal" in capsys.readouterr().out
    assert run("convert", "model", "model.safetensors") == 0
    assert run("convert", "model", "again") == 0
    assert '"PostcardPipeline"' in Path("again/model_index.json").read_text()


def test_a_conditioner_with_a_second_encoder(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    load_extensions(["second_encoder.py"])
    parts = tiny_pipeline("clip").components
    second = tiny_pipeline("bert").components
    more = {"text_encoder_2": second["text_encoder"], "tokenizer_2": second["tokenizer"]}
    pipeline = registry.find_kind("TwoEncoderPipeline").load()(**parts, **more)
    pipeline.set_progress_bar_config(disable=True)
    states, negative = pipeline.encode_prompt("a red cup")
    assert states.shape == negative.shape == (1, 24, 16)
    first, _ = tiny_pipeline("clip").encode_prompt("a red cup")
    torch.testing.assert_close(states[:, :12], first)
    pipeline.register_defaults(num_inference_steps=2)
    pipeline.save_pretrained("model")
    options = ["a red cup", "--model", "model", "--seed", "1", "--negative-prompt", "blue", "-o", "cup.png"]
    assert run("--extension", "second_encoder.py", "generate", *options) == 0
    assert run("replay", "cup.png") == 0
    assert "equal" in capsys.readouterr().out
    before = pipeline("a red cup", seed=1, output_type="pt", num_inference_steps=2).images
    with torch.no_grad():
        pipeline.text_encoder_2.embeddings.word_embeddings.weight.normal_()
    after = pipeline("a red cup", seed=1, output_type="pt", num_inference_steps=2).images
    assert (before - after).abs().max() > 1e-4


def test_what_cannot_be_loaded_is_named(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("json.py").write_text("")
    Path("broken.py").write_text("import a_module_that_is_not_there")
    for name, message in (
        ("nowhere.py", "the extension nowhere.py: no such file"),
        ("json.py", "has the name of another module, json; rename the file"),
        ("broken.py", "the extension broken.py cannot be imported: No module named 'a_module_that_is_not_there'"),
        ("no_module_of_this_name", "the extension no_module_of_this_name cannot be imported"),
    ):
        assert run("--extension", name, "doctor", "x") == 2
        assert message in capsys.readouterr().err
    assert "broken" not in sys.modules
    monkeypatch.setenv(VARIABLE, "nowhere.py")
    assert run("doctor", "x") == 2
    assert "nowhere.py: no such file" in capsys.readouterr().err


def test_a_process_is_trained_on_drawn_with_and_replayed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through ``finetune``, on a model whose scheduler samples from the process."""
    import straight
    from PIL import Image

    from latentdiff.diffusion import processes

    monkeypatch.setattr(processes, "_PROCESSES", [*processes._PROCESSES])
    source = Path(straight.__file__).read_text()
    registered = "from latentdiff.diffusion import register_process\n\nregister_process(Straight)\n"
    Path("flow.py").write_text(f"{source}\n{registered}")
    pipeline = tiny_pipeline("clip")
    pipeline.scheduler = straight.Straight().scheduler()
    pipeline.save_pretrained("model")
    Path("data").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 90, 30)).save(f"data/{i}.png")
        Path(f"data/{i}.txt").write_text(f"cup {i}")
    settings = ["batch_size=2", "max_steps=2", "checkpoint_every=2", "sample_every=2", "resolution=16"]
    command = ["finetune", "--model", "model", "--data", "data", "--output", "tuned", "--method", "full", *settings]
    assert run(*command) == 2
    assert "neither beta_schedule nor trained_betas" in capsys.readouterr().err
    assert run("--extension", "flow.py", *command) == 0
    losses = [json.loads(line)["loss"] for line in Path("tuned/training/metrics.jsonl").read_text().splitlines()]
    assert all(0.01 < loss < 10 for loss in losses)
    assert losses
    assert "FlowMatchEulerDiscreteScheduler" in Path("tuned/model_index.json").read_text()
    assert run("generate", "a cup", "--model", "tuned", "--seed", "1", "--steps", "2", "-o", "cup.png") == 0
    assert run("replay", "cup.png") == 0
    assert "equal" in capsys.readouterr().out
