"""A run's output folder: held by one process, gone on with by settings that fit, and whole when it is read again."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import forks, kill, start, wait
from safetensors.torch import load_file
from straight_line import Line, go, settings

from latentdiff.training.card.card import describe
from latentdiff.training.card.kinds import autoencoder_kind
from latentdiff.training.commands.settings_arguments import load_settings
from latentdiff.training.loop.checkpoints import whole_checkpoints
from latentdiff.training.loop.output_folder import changes, hold, open_output, state_of, typed_as
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import (
    AutoencoderSettings,
    ClassifierSettings,
    DenoiserSettings,
    DistillationSettings,
    FinetuneSettings,
    RunSettings,
)
from latentdiff.training.trainers.autoencoder import train_autoencoder
from latentdiff.training.trainers.classifier import train_classifier
from latentdiff.training.trainers.denoiser import train_denoiser
from latentdiff.training.trainers.distill import distill
from latentdiff.training.trainers.finetune import finetune


def state(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which says who holds it."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def other_holder(tmp_path: Path) -> Iterator[int]:
    """A process that trains into `tmp_path`; its id."""
    (tmp_path / "training").mkdir()
    held = tmp_path / "held.txt"

    def hold_on() -> None:
        hold(tmp_path / "training")
        worker = os.fork()  # as a data loader's, which lives on when its parent is killed
        if worker:
            held.with_suffix(".part").write_text(str(worker))
            held.with_suffix(".part").rename(held)
        time.sleep(100)

    (child,) = start(hold_on, tmp_path / "log.txt")
    while not held.exists():
        time.sleep(0.001)
    yield child
    kill([child, int(held.read_text())])
    with suppress(ChildProcessError):
        os.waitpid(child, 0)


@forks
def test_a_second_run_is_told_who_holds_the_folder(other_holder: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"is being trained into by process {other_holder} of .*another --output"):
        open_output(settings(tmp_path))
    with pytest.raises(ValueError, match=f"process {other_holder}"):
        TrainingRun(settings(tmp_path), Line())
    assert state(tmp_path / "training") == {}
    kill([other_holder])
    assert wait([other_holder]) == [-signal.SIGKILL]
    TrainingRun(settings(tmp_path), Line()).finish()  # a killed process holds nothing


@forks
def test_the_end_of_a_run_frees_its_folder(tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    lock = tmp_path / "training" / ".lock"
    assert lock.read_text().startswith(f"process {os.getpid()} of ")
    log = tmp_path / "log.txt"
    assert wait(start(lambda: hold(tmp_path / "training"), log)) == [1]
    assert f"is being trained into by process {os.getpid()} of" in log.read_text(encoding="utf-8")
    run.finish()
    assert wait(start(lambda: hold(tmp_path / "training"), log)) == [0]


@pytest.mark.parametrize("kind", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_arguments: object) -> None:
        raise OSError(kind, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    go(TrainingRun(settings(tmp_path), Line()))
    assert "its file system has no locks" in caplog.text


@pytest.mark.parametrize("changes", [{"seed": 1}, {"optimizer": "sgd"}])
def test_what_a_run_began_with_stays(changes: dict[str, Any], tmp_path: Path) -> None:
    go(TrainingRun(settings(tmp_path), Line()))
    before = state(tmp_path)
    key = next(iter(changes))
    with pytest.raises(ValueError, match=rf"step-00000040: the run there was begun otherwise \({key} was .*, now"):
        TrainingRun(settings(tmp_path, max_steps=50, **changes), Line())
    assert state(tmp_path) == before


def test_other_changes_are_said_and_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(TrainingRun(settings(tmp_path), Line()))
    with caplog.at_level(logging.INFO, logger="latentdiff"):
        run = TrainingRun(settings(tmp_path, max_steps=50, learning_rate=0.01), Line())
    assert caplog.text.count("than before: max_steps 50 (was 40), learning_rate 0.01 (was 0.1)") == 1
    assert run.step == 40


def test_changes_are_kept_as_a_history(tmp_path: Path) -> None:
    go(TrainingRun(settings(tmp_path, max_steps=10), Line())).finish()
    go(TrainingRun(settings(tmp_path, max_steps=20, learning_rate=0.01), Line())).finish()
    run = go(TrainingRun(settings(tmp_path, max_steps=30, learning_rate=0.01, data="other"), Line()))
    found = [(one["step"], one["setting"], one["old"], one["new"]) for one in run.history]
    rate = (10, "learning_rate", 0.1, 0.01)
    assert sorted(found) == [rate, (10, "max_steps", 10, 20), (20, "data", "-", "other"), (20, "max_steps", 20, 30)]
    text = (tmp_path / "training" / "settings.yaml").read_text()
    assert re.search(r"^# [\d-]+ [\d:]+, step 10: learning_rate 0.1 -> 0.01$", text, re.MULTILINE)
    assert re.search(r'step 20: data "-" -> "other"$', text, re.MULTILINE)
    assert RunSettings.load(tmp_path / "training" / "settings.yaml") == run.settings
    describe(run, autoencoder_kind("kl"), pictures=3)
    card = (tmp_path / "README.md").read_text()
    assert re.search(r"^\| [\d-]+ [\d:]+ \| 10 \| learning_rate \| 0.1 \| 0.01 \|$", card, re.MULTILINE)
    run.finish()
    state = whole_checkpoints(run.checkpoints.folder)[-1] / "state.json"
    assert json.loads(state.read_text())["history"] == run.history


def test_settings_that_an_older_version_did_not_know_are_no_changes(tmp_path: Path) -> None:
    before = state_of(settings(tmp_path))
    del before["held_out_share"]
    assert changes(before, settings(tmp_path, learning_rate=0.5)) == [("learning_rate", 0.1, 0.5)]


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    go(TrainingRun(settings(tmp_path), Line()))
    other = AutoencoderSettings(data="-", output=str(tmp_path))
    own = "RunSettings, which 'latentdiff train autoencoder' does not go on with; choose another --output"
    with pytest.raises(ValueError, match=f"^{tmp_path} holds a run of {own}"):
        open_output(other)
    assert typed_as("DenoiserSettings") == "'latentdiff train denoiser'"
    assert typed_as("DistillationSettings") == "'latentdiff distill'"


def test_a_file_and_the_folder_of_the_pictures_are_no_output(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "below"):
        with pytest.raises(
            ValueError, match=f"^{file} is a file, and no folder to train into; choose another --output"
        ):
            open_output(settings(output))
    with pytest.raises(ValueError, match=f"^{tmp_path} is the folder of the pictures"):
        open_output(AutoencoderSettings(data=f"{tmp_path}/", output=str(tmp_path)))
    open_output(AutoencoderSettings(data=str(tmp_path), output=str(tmp_path / "model")))


@pytest.mark.parametrize(("file", "what"), [("model_index.json", "a pipeline"), ("config.json", "a model")])
def test_a_model_that_no_training_made_is_not_replaced(file: str, what: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=f"^{tmp_path} holds {what} that was not made by training; choose another"):
        open_output(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("train", "kind", "missing"),
    [
        (finetune, FinetuneSettings, {"model": "nobody/nothing"}),
        (distill, DistillationSettings, {"model": "nobody/nothing", "data": "-"}),
        (train_denoiser, DenoiserSettings, {"autoencoder": "nothing"}),
        (train_classifier, ClassifierSettings, {"model": "nothing"}),
        (train_autoencoder, AutoencoderSettings, {"kind": "tiny", "teacher": "nothing"}),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_before_models_are_loaded(
    train: Any, kind: Any, missing: dict[str, Any], tmp_path: Path
) -> None:
    go(TrainingRun(settings(tmp_path), Line()))
    with pytest.raises(ValueError, match=f"holds a run of RunSettings, which {typed_as(kind.__name__)} does not go on"):
        train(kind.load(None, {"data": "-", "output": str(tmp_path), **missing}))


def test_a_run_beyond_max_steps_is_left_alone(tmp_path: Path) -> None:
    go(TrainingRun(settings(tmp_path, max_steps=30), Line()))
    before = state(tmp_path)
    with pytest.raises(ValueError, match=r"is at step 30 already, so with max_steps=24 there is nothing to do"):
        TrainingRun(settings(tmp_path, max_steps=24, learning_rate=0.01), Line())
    assert state(tmp_path) == before
    assert TrainingRun(settings(tmp_path, max_steps=30), Line()).step == 30


def given(tmp_path: Path, *overrides: str, **options: Any) -> RunSettings:
    return load_settings(RunSettings, None, list(overrides), output=tmp_path, **options)


def test_what_is_not_given_again_is_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ("lr=0.5", "max_steps=20", "log_every=10", "report_to=[]", "checkpoint_every=5", "max_minutes=9")
    go(TrainingRun(given(tmp_path, *first, data="-"), Line())).finish()
    assert not capsys.readouterr().out
    file = tmp_path / "mine.yaml"
    file.write_text("checkpoint_every: 500\n")  # the default, given
    again = load_settings(RunSettings, file, ["max_steps=30"], output=tmp_path)
    assert (again.learning_rate, again.max_steps, again.checkpoint_every, again.data) == (0.5, 30, 500, "-")
    assert again.max_minutes is None  # of one sitting
    said = capsys.readouterr().out
    assert said.count("what was not given is as it was there: data=-, learning_rate=0.5\n") == 1, said
    go(TrainingRun(again, Line())).finish()
    assert given(tmp_path, "lr=2e-4").learning_rate == 2e-4
    assert given(tmp_path).checkpoint_every == 500  # the newest word counts


def test_defaults_that_a_model_or_a_setting_gave_are_not_kept_as_given(tmp_path: Path) -> None:
    begun = given(tmp_path, "max_steps=20", data="-").completed(sample_every=7)
    assert (begun.sample_every, begun.warmup_steps) == (7, 2)
    go(TrainingRun(begun, Line())).finish()
    assert (given(tmp_path, "max_steps=500").warmup_steps, given(tmp_path).sample_every) == (100, 500)


def test_what_does_not_go_with_a_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(TrainingRun(given(tmp_path, "max_steps=20", "decay_steps=15", data="-"), Line())).finish()
    with pytest.raises(ValueError, match=r"seed was 0, now 3"):
        given(tmp_path, "seed=3", "warmup_steps=100")
    for change, wrong in {"seed=3": "seed was 0, now 3", "max_steps=19": "step 20 already"}.items():
        with pytest.raises(ValueError, match=wrong):
            given(tmp_path, change)
    assert "Going on" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"more than\s+max_steps=20(.|\n)*is as the run in .* has it: .*decay_steps"):
        given(tmp_path, "warmup_steps=10")


def test_one_folder_written_otherwise_is_no_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stamps", "below", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    go(TrainingRun(settings(tmp_path / "out", data="stamps", max_steps=10), Line())).finish()
    monkeypatch.chdir("below")
    assert load_settings(RunSettings, None, [], output=tmp_path / "out").data == str(tmp_path / "stamps")
    with caplog.at_level(logging.INFO, logger="latentdiff"):
        run = go(TrainingRun(settings(tmp_path / "out", data="../stamps", max_steps=20), Line()))
    assert "other settings than before: max_steps 20 (was 10)\n" in caplog.text
    assert [one["setting"] for one in run.history] == ["max_steps"]
    run.finish()
    (tmp_path / "below" / "stamps").mkdir()  # the same words, another folder
    assert load_settings(RunSettings, None, [], output=tmp_path / "out").data == "../stamps"
    run = TrainingRun(settings(tmp_path / "out", data="../other", max_steps=30), Line())
    assert [one["setting"] for one in run.history[1:]] == ["data", "max_steps"]


def test_settings_that_nothing_would_be_trained_with_are_refused(tmp_path: Path) -> None:
    go(TrainingRun(settings(tmp_path), Line())).finish()
    before = state(tmp_path)
    with pytest.raises(
        ValueError, match=r"at step 40, which is all of max_steps, .* with learning_rate 0.01 \(was 0.1"
    ):
        TrainingRun(settings(tmp_path, learning_rate=0.01), Line())
    assert state(tmp_path) == before
    assert TrainingRun(settings(tmp_path, sample_every=7), Line()).step == 40


def test_fixed_settings_exist() -> None:
    for kind in (AutoencoderSettings, DenoiserSettings, FinetuneSettings):
        assert set(kind.fixed) <= kind.model_fields.keys()
        assert {"seed", "optimizer"} <= set(kind.fixed)
    asked = {"prediction_type", "noise_schedule", "num_train_timesteps", "attention_head_dim", "norm_num_groups"}
    assert asked <= set(DenoiserSettings.fixed)


@pytest.mark.parametrize("name", ["trained.safetensors", "averaged-0.safetensors", "optimizer.bin", "state.json"])
def test_a_flipped_bit_is_noticed(name: str, tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    file = whole_checkpoints(run.checkpoints.folder)[-1] / name
    content = bytearray(file.read_bytes())
    where = content.index(b'"step": 40') + 8 if name == "state.json" else len(content) // 2
    content[where] ^= 1  # of the state the step becomes 50, which is JSON as before
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"step-00000040/{name} is damaged .* goes on from step-00000030"):
        TrainingRun(settings(tmp_path, max_steps=50), Line())
    shutil.rmtree(file.parent)
    assert TrainingRun(settings(tmp_path, max_steps=50), Line()).step == 30


@pytest.mark.parametrize("name", ["averaged-0.safetensors", "optimizer.bin", "state.json", "SHA256SUMS"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    (whole_checkpoints(run.checkpoints.folder)[-1] / name).unlink()
    with pytest.raises(ValueError, match=rf"step-00000040/{name} is damaged"):
        TrainingRun(settings(tmp_path, max_steps=50), Line())


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"format": 3}'])
def test_a_state_that_says_nothing_is_refused(content: str, tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    (whole_checkpoints(run.checkpoints.folder)[-1] / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"step-00000040.* is (damaged|of another version)"):
        TrainingRun(settings(tmp_path, max_steps=50), Line())


def test_an_average_can_begin_late(tmp_path: Path) -> None:
    """It begins with the trained weights, and not with those that a new network has."""
    before = go(TrainingRun(settings(tmp_path, ema_decay=0.0), Line()))
    run = TrainingRun(settings(tmp_path, ema_decay=0.9, max_steps=50), Line())
    assert torch.equal(run.learner.average.weights[0], before.objective.slope)
    assert not run.learner.average.weights[0].requires_grad
    go(run)
    saved = load_file(whole_checkpoints(run.checkpoints.folder)[-1] / "averaged-0.safetensors")
    assert torch.dist(saved["0"], run.objective.slope) < 0.1


def test_records_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    go(TrainingRun(settings(tmp_path), Line()))
    file = tmp_path / "training" / "metrics.jsonl"
    rows = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*rows[:3], b'{"step": 17, "loss": "\xff\xfe"}\n', *rows[3:], b'{"step": 4']))
    go(TrainingRun(settings(tmp_path, max_steps=50), Line()))
    found = [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert found == [1, *range(5, 51, 5)]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = [".saving-ab_d1fgh", ".partial-0123456789abcdef.png", ".partial-0123456789abcdef"]
    kept = [".saving-mine", ".partial-notes.txt", ".saving", "saving-abcdefgh"]
    (tmp_path / "training" / "samples").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "training", tmp_path / "training" / "samples"):
        (folder / names[0] / "unet").mkdir(parents=True)
        (folder / names[0] / "unet" / "config.json").write_text("{}")
        for name in names[1:] + kept:
            (folder / name).write_text("x")
    open_output(settings(tmp_path))
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, ".lock"}
    assert not list(tmp_path.rglob(names[0]))


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_missing_tracker_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report_to=tensorboard needs the package tensorboard: pip install"):
        open_output(settings(tmp_path, report_to="tensorboard"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_half_precision_on_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mixed_precision=fp16 needs a GPU"):
        TrainingRun(settings(tmp_path, mixed_precision="fp16"), Line())
    assert not list(tmp_path.iterdir())


def test_a_run_says_its_processes_and_the_size_of_an_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.INFO, logger="latentdiff"):
        TrainingRun(settings(tmp_path, gradient_accumulation_steps=3), Line())
    assert "asks for bf16; settings alone count: mixed_precision=bf16" in caplog.text
    assert "in float32; an update has 12 pictures: batch_size 4 x 3 accumulated x 1 process" in caplog.text
