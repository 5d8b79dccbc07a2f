"""``--runtime`` of the commands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from latentdiff.interchange.png import read_settings


@pytest.mark.slow
def test_command_draws_and_replays(
    model: str, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "red.png"
    words = ["generate", "a red thing", "--model", model, "-o", file, "--seed", 3]
    assert run(*words, "--runtime", "openvino") == 0
    record = read_settings(file)
    assert (record["runtime"], record["precision"]) == ("openvino", "float32")
    assert run("replay", file) == 0


def test_commands_refuse_what_a_runtime_does_not_take(
    model: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for more, message in (
        (["--precision", "int8"], "torch does not draw in int8"),
        (["--runtime", "onnx", "--device", "cuda"], "--runtime onnx computes on the processor"),
    ):
        assert run("generate", "a red thing", "--model", model, *more) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
