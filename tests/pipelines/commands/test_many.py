"""``latentdiff many``; for what it does see tests/pipelines/test_many.py."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lives import free_port

from latentdiff.interchange.fingerprint import model_digest
from latentdiff.interchange.png import read_settings
from latentdiff.pipelines.batch import many
from latentdiff.pipelines.commands import many as commands

Run = Callable[..., int]


def write_prompts(count: int = 5) -> None:
    lines = [json.dumps({"prompt": f"a cup {i}", "file_name": f"cups/{i}.png"}) for i in range(count)]
    Path("prompts.jsonl").write_text("\n".join(lines))


def test_a_file_to_a_folder(model: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts()
    common = ["many", "prompts.jsonl", "-o", "out", "--model", model, "--steps", "2", "--seed", "4", "--guidance", "2"]
    assert run(*common) == 0
    assert re.search(r"out: 5 drawn, 0 there already, 0 failed, \d", capsys.readouterr().out)
    settings = read_settings(Path("out/cups/3.png")) or {}
    assert (settings["seed"], settings["num_inference_steps"], settings["guidance_scale"]) == (7, 2, 2.0)
    assert settings["model_digest"] == model_digest(Path(model))
    assert run(*common) == 0
    assert "out: 0 drawn, 5 there already" in capsys.readouterr().out
    assert run("replay", "out/cups/3.png") == 0
    assert len(Path("out/metadata.jsonl").read_text().splitlines()) == 5


def test_nothing_left_to_draw_loads_no_weights(
    model: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(2)
    common = ["many", "prompts.jsonl", "-o", "out", "--model", model, "--guidance", "2", "--scheduler", "euler"]
    loaded, load = [], commands.load_pipeline

    def counted(*arguments: Any) -> Any:
        loaded.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(commands, "load_pipeline", counted)
    assert run(*common, "--steps", "2") == run(*common, "--steps", "2") == 0
    assert len(loaded) == 1
    assert "out: 0 drawn, 2 there already" in capsys.readouterr().out
    for change in (["--steps", "3"], ["--steps", "3", "--precision", "bfloat16"], []):  # without: the model's own
        assert run(*common, *change) == run(*common, *change) == 0
        assert "out: 2 drawn, 0 there already" in capsys.readouterr().out
    assert len(loaded) == 4
    Path("out/cups/1.png").unlink()
    assert run(*common) == 0
    assert len(loaded) == 5


def test_several_of_each(model: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.csv").write_text("prompt,seed\na cup,\na hat,70\n")
    assert run("many", "prompts.csv", "-o", "out", "--model", model, "--steps", "2", "-n", "2", "--seed", "5") == 0
    rows = [json.loads(line) for line in Path("out/metadata.jsonl").read_text().splitlines()]
    assert [(row["file_name"], row["text"], row["seed"]) for row in rows] == [
        ("000001.png", "a cup", 5),
        ("000002.png", "a cup", 6),
        ("000003.png", "a hat", 70),
        ("000004.png", "a hat", 71),
    ]
    write_prompts(1)
    assert run("many", "prompts.jsonl", "-o", "other", "--model", model, "-n", "2") == 2
    assert "--count 2: several pictures cannot share the file_name 'cups/0.png'" in capsys.readouterr().err
    assert not Path("other").exists()


def test_failures_are_told_at_the_end(model: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.csv").write_text("prompt,height\na cup,\na hat,15\na car,\n")
    assert run("many", "prompts.csv", "-o", "out", "--model", model, "--steps", "2") == 1
    told = capsys.readouterr()
    assert "out/000002.png: not drawn: height=15 is not a multiple of 2" in told.err
    assert "out: 2 drawn, 0 there already, 1 failed" in told.out


def test_ctrl_c(model: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts()
    common = ["many", "prompts.jsonl", "-o", "out", "--model", model, "--steps", "2", "--batch-size", "2"]
    calls, draw = [], many.draw_batch

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(many, "draw_batch", interrupted)
    assert run(*common) == 130
    error = capsys.readouterr().err
    assert "Stopped; 2 of 5 pictures were drawn in out. Repeat the command to go on" in error
    assert "Traceback" not in error
    assert run(*common) == 0
    assert "out: 3 drawn, 2 there already" in capsys.readouterr().out


def test_mistakes(model: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "file_name": "../x.png"}')
    Path("good.txt").write_text("a cup")
    for arguments, message in (
        (["none.txt", "-o", "out"], "none.txt: no such file"),
        (["bad.jsonl", "-o", "out"], "leaves the folder"),
        (["good.txt", "-o", "out", "--scheduler", "magic"], "unknown scheduler 'magic'"),
        (["good.txt", "-o", "good.txt"], "good.txt"),
        (["good.txt", "-o", "out", "--class", "cat"], "give one of the two"),
        (["-o", "out", "-n", "3"], "give a file of prompts"),
        (["-o", "out", "--class", "cat"], "give a file of prompts"),
    ):
        assert run("many", *arguments, "--model", model) == 2
        assert message in capsys.readouterr().err
        assert not Path("out").exists()


@pytest.mark.slow
def test_torchrun(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cup {letter}" for letter in "abcdefghijklm"))
    alone = ["-m", "latentdiff"]
    several = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    for name, start in (("one", alone), ("two", [*several, *alone])):
        command = [sys.executable, *start, "many", "prompts.txt", "-o", name, "--model", model, "--batch-size", "3"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"{name}: 13 drawn") == 1, "only the first process reports"
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 14
    assert one == two
