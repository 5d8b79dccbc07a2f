"""The loop that the trainers share: bad losses, the learning rate, records, trackers, stopping."""

import json
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from straight_line import Line, Points, go, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.training.loop.checkpoints import whole_checkpoints
from latentdiff.training.loop.distributed import accelerator_of
from latentdiff.training.loop.figures import MARGINS, WIDTH, curves, panel
from latentdiff.training.loop.optimizers_and_schedules import learning_rate_at
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.loop.stopping import Stopping, in_order


def rows(tmp_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()]


def with_a_bad_one(bad: float, at: int) -> Callable[[int], Tensor]:
    def batch(number: int) -> Tensor:
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(number))
        return x * bad if number == at else x

    return batch


def test_it_learns_and_keeps_records(tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    assert [row["step"] for row in rows(tmp_path)] == [1, *range(5, 41, 5)]
    assert rows(tmp_path)[-1]["loss"] < rows(tmp_path)[0]["loss"] / 3
    assert set(run.progress()) == {"loss", "pictures/s", "memory"}
    assert [folder.name for folder in whole_checkpoints(run.checkpoints.folder)] == ["step-00000030", "step-00000040"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_a_bad_update_stops_the_run_and_names_its_pictures(tmp_path: Path, bad: float) -> None:
    run = TrainingRun(settings(tmp_path), Line())
    with pytest.raises(FloatingPointError, match=r"at step 25 .*25-0.png, 25-1.png, .*on_bad_loss=skip"):
        go(run, with_a_bad_one(bad, at=25))
    assert run.objective.slope.isfinite().all()
    assert [folder.name for folder in whole_checkpoints(run.checkpoints.folder)] == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("bad", [math.nan, 1e6])
def test_a_bad_update_is_left_out(tmp_path: Path, bad: float, caplog: pytest.LogCaptureFixture) -> None:
    calm = go(TrainingRun(settings(tmp_path / "calm"), Line()))
    run = go(TrainingRun(settings(tmp_path / "bad", on_bad_loss="skip"), Line()), with_a_bad_one(bad, at=25))
    assert run.step == 40
    assert run.learner.skipped == rows(tmp_path / "bad")[-1]["skipped"] == 1
    assert "25-0.png" in caplog.text
    assert torch.dist(run.objective.slope, calm.objective.slope) < 0.1
    assert run.objective.slope.isfinite().all()


def test_too_many_bad_updates_stop_the_run_all_the_same(tmp_path: Path) -> None:
    run = TrainingRun(settings(tmp_path, on_bad_loss="skip"), Line())
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        go(run, lambda number: torch.full((4, 2), math.nan))


def test_an_update_reads_what_it_computed_only_once(tmp_path: Path) -> None:
    read: list[str] = []

    class Reading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_local_scalar_dense":  # the one reading, of a list, is not among them
                read.append(str(func))
            return func(*args, **(kwargs or {}))

    run = TrainingRun(settings(tmp_path), Line())
    with Reading():
        run.learner.learn(Points(torch.randn(4, 2)), 0)
    assert read == []


def test_what_is_frozen_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    assert float(run.objective.fixed.detach()) == 1
    from safetensors.torch import load_file

    assert load_file(whole_checkpoints(run.checkpoints.folder)[-1] / "trained.safetensors").keys() == {"slope"}


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.0}, {"optimizer": "sgd"}, {"optimizer": "adafactor"}])
def test_resuming_is_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    straight = go(TrainingRun(settings(tmp_path / "a", decay_steps=10, **changes), Line()))
    stopped = TrainingRun(settings(tmp_path / "b", decay_steps=10, **changes), Line())
    for number in stopped.passes():
        stopped.learn(Points(torch.randn(4, 2, generator=torch.Generator().manual_seed(number))))
        if stopped.step == 23:  # not saved: what was recorded after step 20 is forgotten
            break
    resumed = TrainingRun(settings(tmp_path / "b", decay_steps=10, **changes), Line())
    assert resumed.step == 20
    go(resumed)
    assert torch.equal(straight.objective.slope, resumed.objective.slope)
    averages = straight.learner.average.weights, resumed.learner.average.weights
    assert len(averages[0]) == len(averages[1]) == int(changes.get("ema_decay") != 0)
    assert all(torch.equal(one, other) for one, other in zip(*averages, strict=True))

    def without_rate(folder: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "pictures_per_second"} for row in rows(folder)]

    assert without_rate(tmp_path / "a") == without_rate(tmp_path / "b")


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    file = whole_checkpoints(run.checkpoints.folder)[-1] / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    del state["format"]  # as before formats were numbered
    file.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match=r"step-00000040 is of another version of latentdiff.*another --output"):
        TrainingRun(settings(tmp_path, max_steps=50), Line())


def test_no_average_and_a_fast_one(tmp_path: Path) -> None:
    plain = go(TrainingRun(settings(tmp_path / "a", ema_decay=0.0), Line()))
    assert not plain.learner.average.weights
    with plain.averaged():
        assert not plain.objective.training
    warm = go(TrainingRun(settings(tmp_path / "b", ema_decay=0.999), Line()))
    cold = go(TrainingRun(settings(tmp_path / "c", ema_decay=0.999, ema_warmup=False), Line()))
    trained = warm.objective.slope.detach().clone()
    with warm.averaged():
        near = torch.dist(warm.objective.slope, trained)
    with cold.averaged():
        far = torch.dist(cold.objective.slope, trained)
    assert near < far / 2
    assert torch.equal(warm.objective.slope, trained)


def test_the_learning_rate_counts_updates(tmp_path: Path) -> None:
    plan = settings(tmp_path, warmup_steps=10, decay_steps=20, gradient_accumulation_steps=3)
    assert [learning_rate_at(plan, step) for step in (0, 9, 20)] == pytest.approx([0.01, 0.1, 0.1])
    assert learning_rate_at(plan, 30) == pytest.approx(0.05)
    run = TrainingRun(plan, Line())
    seen = []
    for number in run.passes():
        run.learn(Points(torch.ones(4, 2)))
        if number % 3 == 2:
            seen.append(run.learner.optimizer.param_groups[0]["lr"])
    assert seen == [learning_rate_at(plan, step) for step in range(40)]
    cosine = settings(tmp_path, decay_steps=20, decay_shape="cosine")
    assert [learning_rate_at(cosine, step) for step in (20, 30, 40)] == pytest.approx([0.1, 0.05, 0.0])


def test_accumulated_passes_are_one_update(tmp_path: Path) -> None:
    x = torch.randn(8, 2)
    whole = TrainingRun(settings(tmp_path / "a", batch_size=8), Line())
    for _ in whole.passes():
        whole.learn(Points(x))
    parts = TrainingRun(settings(tmp_path / "b", gradient_accumulation_steps=2), Line())
    assert whole.update_size == parts.update_size == 8
    assert [list(parts.slots(number)) for number in (0, 1, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    for number in parts.passes():
        parts.learn(Points(x[list(parts.slots(number))]))
    torch.testing.assert_close(whole.objective.slope, parts.objective.slope)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_stops(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    number_of = getattr(signal, name, None)
    if number_of is None:
        pytest.skip(f"there is no {name} here")
    before = signal.getsignal(number_of)
    signal.signal(number_of, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    run = TrainingRun(settings(tmp_path), Line())

    def batch(number: int) -> Tensor:
        if number == 17:
            os.kill(os.getpid(), number_of)
        return torch.ones(4, 2)

    go(run, batch)
    assert run.step == 18
    assert whole_checkpoints(run.checkpoints.folder)[-1].name == "step-00000018"
    assert signal.getsignal(number_of) == signal.SIG_DFL
    signal.signal(number_of, before)
    assert "Ctrl-C again" in capfd.readouterr().err
    with pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
        run.finish()
    by = "Ctrl-C" if name == "SIGINT" else name
    assert f"Stopped by {by} at step 18 of 40. Repeat the command to go on" in caplog.text
    assert stop.type is KeyboardInterrupt if name == "SIGINT" else stop.value.args == (128 + number_of,)


def test_a_signal_ends_samples_at_once_and_a_late_ctrl_c_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = TrainingRun(settings(tmp_path), Line())
    done = []

    def draw() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append("all pictures")

    with run.stopping.signals():
        run.stopping.at_leisure(draw)
        run.stopping.at_leisure(draw)  # and no more are begun
        assert run.stopping.must_stop()
        os.kill(os.getpid(), signal.SIGINT)  # as from a launcher, for the same key
        monkeypatch.setattr("latentdiff.training.loop.stopping.SAME", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not done
    said = capfd.readouterr().err
    assert "the samples are left out" in said
    assert "the step under way" not in said


def test_a_stop_that_no_run_speaks_of_is_said() -> None:
    said: list[str] = []
    with pytest.raises(SystemExit) as stop, in_order(said.append):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt), in_order(said.append):
        os.kill(os.getpid(), signal.SIGINT)
    stopping = Stopping(accelerator_of(settings(Path("none"))), None)
    stopping.signal = signal.SIGINT
    with pytest.raises(KeyboardInterrupt), in_order(said.append):
        stopping.leave()  # of a run, which has said so itself
    assert said == ["SIGTERM", "Ctrl-C"]


def test_workers_that_a_stop_ends_late_raise_nothing() -> None:
    """A signal to the whole group ends a loader's workers too, of which torch then tells by an error."""
    deaths = []
    before = signal.signal(signal.SIGCHLD, lambda *_: deaths.append(len(deaths)))
    try:
        stopped, next_one = (Stopping(accelerator_of(settings(Path("none"))), None) for _ in range(2))
        with stopped.signals():
            os.kill(os.getpid(), signal.SIGCHLD)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.requested
        os.kill(os.getpid(), signal.SIGCHLD)
        assert deaths == [0]
        with next_one.signals():  # another run in this process is told again
            os.kill(os.getpid(), signal.SIGCHLD)
        os.kill(os.getpid(), signal.SIGCHLD)
        assert deaths == [0, 1, 2]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_signal_that_comes_while_processes_agree_is_for_the_next_time() -> None:
    class TwoProcesses:
        num_processes, is_main_process, device = 2, True, torch.device("cpu")

        def gather(self, found: Tensor) -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)  # too late for what is gathered
            return torch.cat([found, found])

    stopping = Stopping(TwoProcesses(), None)  # type: ignore[arg-type]
    with stopping.signals():
        assert not stopping.must_stop()
        assert stopping.must_stop()


def test_a_signal_after_the_last_step_is_no_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def batch(number: int) -> Tensor:
        if number == 39:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.ones(4, 2)

    go(TrainingRun(settings(tmp_path), Line()), batch).finish()
    assert "Stopped" not in caplog.text


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_run_that_is_to_outlive_its_terminal_does(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    run = TrainingRun(settings(tmp_path), Line())

    def batch(number: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGHUP)
        return torch.ones(4, 2)

    assert go(run, batch).step == 40
    signal.signal(signal.SIGHUP, before)


def test_time_is_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = go(TrainingRun(settings(tmp_path, max_steps=10**7, max_minutes=0.01), Line()))
    assert 0 < run.step < 10**7
    run.finish()
    assert f"Stopped by max_minutes=0.01 at step {run.step} of 10000000. Repeat the command" in caplog.text


def test_tensorboard_gets_figures_and_pictures(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = go(TrainingRun(settings(tmp_path, report_to=["tensorboard"]), Line()))
    run.show("samples", Image.new("RGB", (8, 8), "red"))
    run.finish()
    events = reader.EventAccumulator(str(tmp_path / "training" / "logs" / "latentdiff"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, *range(5, 41, 5)]
    assert events.Images("samples")[0].step == 40


def test_every_run_draws_its_curves(tmp_path: Path) -> None:
    file = tmp_path / "training" / "curves.png"
    run = TrainingRun(settings(tmp_path, decay_steps=20), Line())
    go(run)
    assert not file.exists()
    run.measured({"val_loss": 0.5})
    early = Image.open(file).copy()
    run.measured({"val_loss": math.nan})
    with (tmp_path / "training" / "metrics.jsonl").open("a") as rest:
        rest.write('{"step": 1')  # half a row
    run.finish()
    assert Image.open(file).size == early.size == (882, 562)  # training loss, held-out loss, learning rate
    middle, bottom = (MARGINS[0] + MARGINS[2]) // 4, MARGINS[3] // 2
    for in_steps, colour in ((True, (31, 119, 180)), (False, (221, 221, 221))):  # it holds, or slopes away
        assert panel("rate", [(1, 0.0), (3, 1.0)], in_steps).getpixel((middle - 9, bottom)) == colour
    rows = [{"step": 1, "loss": 1.0, "val_loss": 2.0}, {"step": 2, "loss": 0.5, "val_loss": 1.0}]
    plain, weighted = curves(rows), curves(rows, "min-SNR")
    assert plain is not None
    assert weighted is not None
    changed = ImageChops.difference(plain, weighted).getbbox()  # the title of the training loss
    assert changed is not None
    assert changed[2] < WIDTH // 2
    assert changed[3] < MARGINS[1] // 2
    assert curves([{"step": 1, "pictures_per_second": 3.0}, {"step": 2, "loss": math.inf}]) is None


def test_a_run_that_is_stopped_early_has_curves_and_the_same_rows_later(tmp_path: Path) -> None:
    def interrupted(number: int) -> Tensor:
        if number == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.full((4, 2), float(number % 3))

    def batch(number: int) -> Tensor:
        return torch.full((4, 2), float(number % 3))

    run = go(TrainingRun(settings(tmp_path / "a", log_every=20), Line()), interrupted)
    run.end_training()
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    early = rows(tmp_path / "a")
    assert [row["step"] for row in early] == [1, 18]
    assert all(row["loss"] >= 0 and row["learning_rate"] == 0.1 for row in early)
    assert Image.open(tmp_path / "a" / "training" / "curves.png").size == (882, 280)
    go(TrainingRun(settings(tmp_path / "a", log_every=20), Line()), batch).end_training()
    go(TrainingRun(settings(tmp_path / "b", log_every=20), Line()), batch).end_training()
    stopped, whole = (
        [(row["step"], row["loss"]) for row in rows(tmp_path / name) if row["step"] != 18] for name in "ab"
    )
    assert stopped == whole
    assert [step for step, _ in whole] == [1, 20, 40]


def test_a_curve_goes_where_its_values_are() -> None:
    falling = np.asarray(panel("loss", [(0, 4.0), (100, 0.0)])).astype(int)  # (H, W, 3)
    blue = np.argwhere(falling[..., 2] - falling[..., 0] > 60)  # rows and columns
    first, last = blue[blue[:, 1].argmin()], blue[blue[:, 1].argmax()]
    left, top, right, bottom = (edge // 2 for edge in MARGINS)
    assert np.abs(first - (top, left)).max() <= 4
    assert np.abs(last - (bottom, right)).max() <= 4
    assert panel("one point", [(7, 2.0)]).size == panel("constant", [(1, 0.0), (2, 0.0)]).size


def test_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        TrainingRun(settings(tmp_path), Line().requires_grad_(False))


def test_a_missing_8_bit_optimizer_is_explained(tmp_path: Path) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install bitsandbytes"):
            TrainingRun(settings(tmp_path, optimizer="adamw8bit"), Line())


def test_logged_steps_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="latentdiff"):
        go(TrainingRun(settings(tmp_path / "a"), Line()))
        TrainingRun(settings(tmp_path / "a", max_steps=50), Line())
    assert "resumed from" in caplog.text


def test_what_cannot_be_recorded_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = TrainingRun(settings(tmp_path), Line())
    folder = run.folder
    (folder / "samples").write_text("no folder can be made here")

    def batch(number: int) -> Tensor:
        if number == 7:
            (folder / "metrics.jsonl").rename(folder / "kept")
            (folder / "metrics.jsonl").mkdir()  # so that nothing can be written
        if number == 17:
            run.show("samples", Image.new("RGB", (8, 8)))
            (folder / "metrics.jsonl").rmdir()
            (folder / "kept").rename(folder / "metrics.jsonl")
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1')  # half a row, as a full disk leaves it
        return torch.ones(4, 2)

    go(run, batch)
    assert run.step == 40
    assert "metrics.jsonl: the figures of step 10 could not be written (Is a directory)" in caplog.text
    assert "samples/step-00000017.png could not be written" in caplog.text
    go(TrainingRun(settings(tmp_path, max_steps=50), Line()))
    assert [row["step"] for row in rows(tmp_path)] == [1, 5, 20, 25, 30, 35, 40, 45, 50]
