"""Files outside the package, from the command line: kinds of pipeline, a conditioner, a process."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from program import run_program
from tiny import tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.diffusion import process
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
    monkeypatch.setattr(process, "PROCESSES", [*process.PROCESSES])
    for name in ("postcards.py", "second_encoder.py", "straight_flow.py"):
        shutil.copy(EXAMPLES / name, name)

    yield partial(run_program, monkeypatch)
    for name in ("postcards", "second_encoder", "straight_flow"):
        sys.modules.pop(name, None)


def save_postcards() -> Any:
    """A model of postcards, in the folder ``model``."""
    load_extensions(["postcards.py"])
    pipeline = registry.find_kind("PostcardPipeline").load()(**tiny_pipeline("clip").components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_defaults(num_inference_steps=2)
    pipeline.save_pretrained("model")
    return pipeline


def two_encoders() -> Any:
    load_extensions(["second_encoder.py"])
    parts = tiny_pipeline("clip").components
    second = tiny_pipeline("bert").components
    more = {"text_encoder_2": second["text_encoder"], "tokenizer_2": second["tokenizer"]}
    pipeline = registry.find_kind("TwoEncoderPipeline").load()(**parts, **more)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_defaults(num_inference_steps=2)
    return pipeline


def has_border(image: Image.Image) -> bool:
    image = image.convert("RGB")
    edge = {image.getpixel((x, y)) for x in range(16) for y in (0, 1, 14, 15)}
    edge |= {image.getpixel((x, y)) for y in range(16) for x in (0, 1, 14, 15)}
    return edge == {(255, 255, 255)} and image.getpixel((8, 8)) != (255, 255, 255)


def write_data() -> None:
    """Four captioned pictures, in the folder ``data``."""
    Path("data").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 90, 30)).save(f"data/{i}.png")
        Path(f"data/{i}.txt").write_text(f"cup {i}")


def test_a_kind_of_pipeline_is_saved_loaded_drawn_from_and_replayed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_extensions(["postcards.py"])
    save_postcards()
    options = ["a cup", "--model", "model", "--seed", "1", "-o", "cup.png"]
    assert run("--extension", "postcards.py", "generate", *options) == 0
    with Image.open("cup.png") as image:
        assert image.size == (16, 16)
        assert has_border(image)
    assert (read_settings(Path("cup.png")) or {})["prompts"] == ["a cup"]
    assert run("replay", "cup.png") == 0  # the environment knows the extension by now
    assert "equal" in capsys.readouterr().out
    assert run("convert", "model", "model.safetensors") == 0
    for source, folder in (("model", "again"), ("model.safetensors", "from file")):
        assert run("convert", source, folder) == 0
        assert '"PostcardPipeline"' in Path(folder, "model_index.json").read_text()


def test_a_conditioner_with_a_second_encoder(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = two_encoders()
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
    pipeline = tiny_pipeline("clip")
    for scheduler, folder in ((diffusers.EDMEulerScheduler(), "edm"), (STRAIGHT(), "model")):
        pipeline.scheduler = scheduler
        pipeline.save_pretrained(folder)
    write_data()
    settings = ["batch_size=2", "max_steps=2", "checkpoint_every=2", "sample_every=2", "resolution=16"]
    command = ["finetune", "--model", "model", "--data", "data", "--output", "tuned", "--method", "full", *settings]
    assert run(*command[:2], "edm", *command[3:]) == 2
    assert "neither beta_schedule nor trained_betas" in capsys.readouterr().err
    assert process.process_of(pipeline.scheduler).name == "flow"
    assert run("--extension", "straight_flow.py", *command) == 0
    assert process.process_of(pipeline.scheduler).name == "straight_flow"
    losses = [json.loads(line)["loss"] for line in Path("tuned/training/metrics.jsonl").read_text().splitlines()]
    assert all(0.01 < loss < 10 for loss in losses)
    assert losses
    assert "FlowMatchEulerDiscreteScheduler" in Path("tuned/model_index.json").read_text()
    assert run("generate", "a cup", "--model", "tuned", "--seed", "1", "--steps", "2", "-o", "cup.png") == 0
    assert run("replay", "cup.png") == 0
    assert "equal" in capsys.readouterr().out


STRAIGHT = diffusers.FlowMatchEulerDiscreteScheduler
TUNING = ["batch_size=2", "max_steps=1", "checkpoint_every=1", "sample_every=1", "resolution=16", "sample_steps=2"]


def test_many_evaluate_and_finetune_use_the_class_that_a_folder_names(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_postcards()
    write_data()
    Path("prompts.txt").write_text("a cup\na car\n")
    assert run("many", "prompts.txt", "-o", "drawn", "--model", "model") == 0
    assert [has_border(Image.open(file)) for file in Path("drawn").rglob("*.png")] == [True, True]
    evaluation = ["--data", "data", "--split", "train", "--count", "2"]
    assert run("evaluate", "model", *evaluation) == 0
    drawn = Path("model/evaluation/samples").rglob("*.png")
    assert [has_border(Image.open(file)) for file in drawn] == [True, True]
    assert Path("model/evaluation/comparison.png").is_file()
    tuning = ["--model", "model", "--data", "data", "--output", "tuned", "--method", "full", *TUNING]
    assert run("finetune", *tuning) == 0
    assert json.loads(Path("tuned/model_index.json").read_text())["_class_name"] == "PostcardPipeline"
    capsys.readouterr()
    Image.new("RGB", (16, 16)).save("start.png")
    assert run("generate", "a cup", "--model", "model", "--image", "start.png", "-o", "cup.png") == 2
    assert "model: a PostcardPipeline takes no picture besides the prompt, and --image was given" in (
        capsys.readouterr().err
    )
    registry.KINDS.pop()  # as where the extension is not loaded
    for command in (
        ["generate", "a cup", "--model", "model"],
        ["many", "prompts.txt", "-o", "again", "--model", "model"],
        ["evaluate", "model", *evaluation],
        ["finetune", *tuning[:5], "again", *tuning[6:]],
    ):
        assert run(*command) == 2
        assert "model: the folder is of a PostcardPipeline, and there is no such kind" in capsys.readouterr().err
    assert not Path("again").exists()


def test_fine_tuning_refuses_a_second_text_encoder(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_encoders().save_pretrained("model")
    write_data()
    assert run("finetune", "--model", "model", "--data", "data", "--output", "tuned", *TUNING) == 2
    assert "model is a TwoEncoderPipeline, which has components or conditions of its own" in capsys.readouterr().err
    assert not Path("tuned").exists()
    Path("prompts.txt").write_text("a cup\n")
    assert run("many", "prompts.txt", "-o", "drawn", "--model", "model") == 0
    first = Path("drawn/metadata.jsonl").parent.glob("*.png")
    assert run("generate", "a cup", "--seed", "0", "--model", "model", "-o", "cup.png") == 0
    assert [Image.open(file).tobytes() for file in first] == [Image.open("cup.png").tobytes()]


def test_evaluation_draws_again_where_the_second_text_encoder_changed(run: Callable[..., int]) -> None:
    from latentdiff.training.evaluation.evaluate import call_settings

    pipeline = two_encoders()
    before = call_settings(pipeline, "model", None, None)["weights"]
    with torch.no_grad():
        pipeline.text_encoder_2.embeddings.word_embeddings.weight.normal_()
    assert call_settings(pipeline, "model", None, None)["weights"] != before


def test_a_postcard_in_every_form(run: Callable[..., int]) -> None:
    pipeline = save_postcards()
    pictures, flags = pipeline("a cup", seed=1, return_dict=False)
    assert flags is None
    assert has_border(pictures[0])
    array = pipeline("a cup", seed=1, output_type="np").images
    tensor = pipeline("a cup", seed=1, output_type="pt").images
    assert (array[:, :2] == 1).all()
    assert (array[:, :, -2:] == 1).all()
    assert (tensor[..., :2] == 1).all()
    assert array[:, 2:-2, 2:-2].mean() < 0.9
    torch.testing.assert_close(torch.from_numpy(array).movedim(-1, 1), tensor)
    plain = TextToImagePipeline.from_pipe(pipeline)("a cup", seed=1, output_type="latent", num_inference_steps=2).images
    torch.testing.assert_close(pipeline("a cup", seed=1, output_type="latent").images, plain)


def test_two_text_encoders_with_given_states_and_in_chunks(run: Callable[..., int]) -> None:
    pipeline = two_encoders()
    states, negative = pipeline.encode_prompt("a red cup")
    again = pipeline.encode_prompt(None, prompt_embeds=states)
    torch.testing.assert_close(again, (states, negative))
    call = {"seed": 1, "output_type": "pt"}
    drawn = pipeline("a red cup", **call).images
    torch.testing.assert_close(pipeline(prompt_embeds=states, **call).images, drawn)
    with pytest.raises(ValueError, match="have 24 tokens, or a multiple, not 20"):
        pipeline(prompt_embeds=states[:, :20])
    long = "a red cup " * 8
    chunked, _ = pipeline.encode_prompt(long, long_prompts="chunk")
    parts = chunked.shape[1] // 24
    assert parts > 1
    assert chunked.shape == (1, 24 * parts, 16)
    own = pipeline.conditioner(torch.device("cpu"), None, False, "chunk").second
    torch.testing.assert_close(chunked[:, 12 * parts :], own([long], parts).states)
    wide = pipeline("a cup " * 8, long_prompts="chunk", **call).images
    assert wide.shape == drawn.shape


@pytest.mark.parametrize("name", ["euler", "ddim", "dpm++"])
def test_a_flow_refuses_schedulers_of_betas(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    load_extensions(["straight_flow.py"])
    pipeline = tiny_pipeline("clip")
    pipeline.scheduler = process.known_processes()["straight_flow"](shift=2.0).scheduler()
    pipeline.save_pretrained("model")
    assert run("generate", "a cup", "--model", "model", "--scheduler", name, "-o", "cup.png") == 2
    assert "cannot sample from a flow; use FlowMatchEulerDiscreteScheduler" in capsys.readouterr().err
    assert not Path("cup.png").exists()
    assert process.process_of(pipeline.scheduler).name == "straight_flow"
    assert process.process_of(diffusers.FlowMatchHeunDiscreteScheduler()).name == "flow"  # the package's
    for other, message in (
        (diffusers.EDMEulerScheduler(), "no noise levels of a diffusion process"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
    ):
        with pytest.raises(ValueError, match=message):
            process.process_of(other)
