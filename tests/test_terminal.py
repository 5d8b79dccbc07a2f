"""What came from a file reaches the terminal escaped, whoever says it."""

import logging
import sys
import warnings
from pathlib import Path

import pytest
import typer
from PIL import Image
from program import run_program

from latentdiff import cli
from latentdiff.interchange.png import read_settings, save_picture
from latentdiff.terminal import printable, printable_lines, printable_messages, say, show_traceback

HARM = "a\x1b]0;title\x07b\x1b[2Jc\r\x9bd\u202ee\udcff\x00"
SAFE = "a\\x1b]0;title\\x07b\\x1b[2Jc\\r\\x9bd\\u202ee\\udcff\\x00"


def is_safe(text: str) -> bool:
    return text.replace("\n", "").isprintable()


def test_what_can_be_shown() -> None:
    for text in ("a red car", "赤い車 é 🚗", ""):
        assert printable(text) == printable_lines(text) == text
    assert printable(HARM) == printable_lines(HARM) == SAFE
    assert printable("a\nb\tc") == "a\\nb\\tc"
    assert printable_lines("a\nb\tc") == "a\n  b       c"
    assert printable_lines("\x1b[1;31mred\x1b[0m") == "\\x1b[1;31mred\\x1b[0m"


def test_commands_loggers_and_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("some.library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with printable_messages():
            say(HARM)
            logger.warning("weights %s", HARM)
            print(warnings.formatwarning(HARM, UserWarning, "a.py", 1, ""), file=sys.stderr)  # type: ignore[arg-type]
        logger.warning("weights %s", "a\x07")
    finally:
        logger.removeHandler(handler)
    captured = capfd.readouterr()
    assert captured.out == f"{SAFE}\n"
    assert f"weights {SAFE}\n" in captured.err
    assert f"UserWarning: {SAFE}\n" in captured.err
    assert captured.err.endswith("a\x07\n"), "outside, loggers are as they were"


def test_colours_of_transformers_are_left_out_and_no_others(capfd: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[31mb\x1b[4mc"
    loggers = [logging.getLogger("transformers.some"), logging.getLogger("latentdiff.some")]
    handler = logging.StreamHandler(sys.stderr)
    with printable_messages():
        for logger in loggers:
            logger.propagate = False
            logger.addHandler(handler)
            logger.warning("%s", name)
            logger.removeHandler(handler)
        print(warnings.formatwarning(name, UserWarning, "a.py", 1, ""), file=sys.stderr)  # type: ignore[arg-type]
    said = capfd.readouterr().err.splitlines()
    assert said[:2] == ["ab\\x1b[4mc", "a\\x1b[31mb\\x1b[4mc"]
    assert "a\\x1b[31mb\\x1b[4mc" in said[2]


@pytest.mark.parametrize("mistake", [ValueError, RuntimeError])
def test_errors(mistake: type[Exception], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise mistake(f"{HARM}\nAll is well.")

    monkeypatch.setenv("LATENTDIFF_DEBUG", "0")
    monkeypatch.setattr(sys, "argv", ["latentdiff"])
    with pytest.raises(SystemExit):
        cli.run(app)
    error = capfd.readouterr().err
    assert is_safe(error)
    assert f"{SAFE}\n  All is well." in error


def test_tracebacks(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError(HARM) from ValueError(HARM)
    except KeyError as error:
        show_traceback(KeyError, error, error.__traceback__)
    said = capfd.readouterr().err
    assert is_safe(said)
    assert f"ValueError: {SAFE}" in said
    assert "\n    raise KeyError(HARM) from ValueError(HARM)\n" in said


def test_a_pictures_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    record = {
        "prompts": ["a"], "count": 1, "seed": 0, "negative_prompt": None, "num_inference_steps": 1,
        "guidance_scale": 1.0, "width": 8, "height": 8, "scheduler": "DDIMScheduler", "precision": "float32",
        "batches": [{"prompts": ["a"], "seeds": [0]}], "pictures": [[0, 0]],
        "machine": {"device": "cpu", "processor": "x", "threads": 1, "torch": "2"},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTDIFF_DEBUG", "0")
    harm = "\x1b[2J\u202eevil"
    for changes in ({"version": harm, "magic": 1}, {"version": "0", harm: 1}, {"version": "0", "model": harm}):
        save_picture(Image.new("RGB", (8, 8)), Path("a.png"), {"model": "none/such", **record, **changes})
        assert read_settings(Path("a.png")) is not None
        assert run_program(monkeypatch, "replay", "a.png") == 2
        error = capfd.readouterr().err
        assert is_safe(error)
        assert "evil" in error
