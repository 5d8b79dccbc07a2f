"""What a run says beforehand: its time, memory and disk, and dry runs, which leave nothing behind."""

import logging
import re
from pathlib import Path

import pytest
import torch
from straight_line import Line, Points, go, settings

from latentdiff.training.loop import estimate
from latentdiff.training.loop.estimate import (
    Pace,
    checkpoint_bytes,
    disk_lines,
    dry_run,
    duration,
    limit_lines,
    looks,
    time_line,
)
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import RunSettings

ONES = Points(torch.ones(4, 2))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.03123, "0.031 seconds"),
        (9.46, "9.5 seconds"),
        (12.34, "12 seconds"),
        (90, "90 seconds"),
        (600, "10 minutes"),
        (12_060, "3 h 21 min"),
        (4e5, "4.6 days"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_in_words() -> None:
    assert [estimate.size(count) for count in (12, 1000, 2**20 * 34.12, 2**41)] == [
        "12 bytes",
        "0.977 KiB",
        "34.1 MiB",
        "2 TiB",
    ]


def test_the_time_of_steps_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 52.0, 74.0])  # begin, the slow first update, one of 2 s, one of 2 s after samples of 20 s
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(clock))
    pace = Pace()
    pace.tick()
    assert pace.seconds == 50
    pace.tick()
    assert (pace.seconds, pace.is_known) == (2, False)
    pace.looked(5.0, share=0.25)
    pace.aside = 20.0
    pace.tick()
    assert (pace.seconds, pace.look) == (2, 20)
    assert time_line(pace, 1000, 5) == (
        "Time: about 35 minutes for 1,000 steps of 2 seconds, with samples and figures 5 times (of 20 seconds each)."
    )

    assert "5 times (of 20 seconds each)" in time_line(pace, 1000, 3, short=2)
    pace.look = 240.0
    line = time_line(pace, 1000, 1, short=1)  # 2000 s and 240 s, and no more than a minute before training
    assert line.startswith("Time: about 38 minutes for")
    assert line.endswith("1 time (of 4 minutes each; those before training a minute at the most).")


def test_updates_that_take_longer_count_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 62.0, 74.0, 76.0])  # those that should take three times the mean, then half of it
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(clock))
    pace = Pace()
    for relative in (3.0, 3.0, 3.0, 0.5):
        pace.tick(relative)
    assert (pace.first, pace.seconds) == (pytest.approx(50 / 3), 4.0)


def test_a_slow_one_among_few_updates_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 80.0, 82.0, 84.0])  # the second takes 30 s, all others 2 s
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(clock))
    pace = Pace()
    known = []
    for _ in range(4):
        pace.tick()
        known.append(pace.is_known)
    assert (pace.seconds, known) == (2, [False, False, False, True])


def test_of_many_updates_it_is_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, *(9.0 + 2 * count + 4 * (count // 4) for count in range(1, 25))])  # every fourth takes 6 s
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(clock))
    pace = Pace()
    for _ in range(25):
        pace.tick()
    assert pace.seconds == 3


def test_a_limit_in_time_says_how_far_it_gets(tmp_path: Path) -> None:
    limited = settings(tmp_path, max_steps=400, max_minutes=5)
    (line,) = limit_lines(limited, 100, needed=900.0, left=240.0)
    assert line == (
        "max_minutes=5 stops it before that: in about 4 minutes, near step 180 of 400. The rest takes 11 "
        "minutes, by the same command."
    )
    assert not list(limit_lines(limited, 100, needed=230.0, left=240.0))


@pytest.mark.parametrize(("step", "number"), [(0, 5), (20, 3), (39, 2), (40, 1), (44, 1)])
def test_samples_that_are_left(step: int, number: int, tmp_path: Path) -> None:
    assert looks(settings(tmp_path, max_steps=45, sample_every=10), step) == number


def test_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    run = go(TrainingRun(settings(tmp_path), Line()))
    # Two weights, their average, Adam's two means and its counter, 4 bytes each.
    assert checkpoint_bytes(run.learner) == (2 + 2 + 2 * 2 + 1) * 4
    (line,) = disk_lines(settings(tmp_path), 2**20, 2**22)
    assert "about 7 MiB" in line
    assert "2 checkpoints of 1 MiB, one more while it is written, the model of 4 MiB" in line
    *_, line = disk_lines(settings(tmp_path / "not there yet"), 2**60, 0)
    assert "more than is free" in line


def test_a_long_run_says_what_it_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.training.loop.run.SHORT", 0.0)
    with caplog.at_level(logging.INFO, "latentdiff"):
        go(TrainingRun(settings(tmp_path), Line()))
    assert caplog.text.count("Time: about") == caplog.text.count("Disk: about") == 1
    assert "for 19 steps of" in caplog.text  # of 40, once 21 have shown the pace
    assert "max_minutes" not in caplog.text


def test_samples_come_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def due(run: TrainingRun) -> list[int]:
        found = []
        for _ in run.passes():
            run.learn(ONES)
            if run.is_to_look():
                found.append(run.step)
                with run.looking():
                    pass
        return found

    assert due(TrainingRun(settings(tmp_path / "a", sample_every=30), Line())) == [30, 40]
    monkeypatch.setattr("latentdiff.training.loop.stopping.FIRST_LOOK", 0.0)
    assert due(TrainingRun(settings(tmp_path / "b", sample_every=30), Line())) == [1, 30, 40]
    (tmp_path / "c" / "training" / "samples").mkdir(parents=True)
    (tmp_path / "c" / "training" / "samples" / "step-00000010.png").touch()  # it has shown something
    assert due(TrainingRun(settings(tmp_path / "c", sample_every=30), Line())) == [30, 40]


def test_a_dry_run_leaves_a_run_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = go(TrainingRun(settings(tmp_path, max_steps=10), Line()))
    run.finish()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def train(found: RunSettings) -> None:
        resumed = TrainingRun(found, Line())
        assert resumed.step == 10
        for _ in resumed.passes():
            resumed.learn(ONES)
            if resumed.is_to_look():
                with resumed.looking():
                    pass

    with caplog.at_level(logging.INFO, "latentdiff"):
        dry_run(train, settings(tmp_path, max_steps=10**9, sample_every=10**9, checkpoint_every=11, max_minutes=0.5))
    assert "for 999,999,990 steps of" in caplog.text
    assert re.search("max_minutes=0.5 stops it before that: in about 30 seconds, near step [0-9,]+ of 1,0", caplog.text)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="the run there was begun otherwise"):
        dry_run(train, settings(tmp_path, max_steps=1000, seed=5))
