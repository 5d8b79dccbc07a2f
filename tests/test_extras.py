"""Advice to install names packages that there are, and not this one, which no index has."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from program import run_program

from latentdiff.extras import how_to_install


def test_how_to_install() -> None:
    assert re.fullmatch(r"pip install 'onnx>=\S+' 'onnxruntime>=\S+' 'onnxscript>=\S+'", how_to_install("onnx"))
    assert how_to_install("heif") == "pip install 'pi-heif>=1.0'"
    assert how_to_install("magic") == "pip install -e '.[magic]' in the folder of this package"
    assert any("extra" in one for one in requires("latentdiff") or ())


@pytest.mark.parametrize(
    ("command", "missing", "said"),
    [
        ("generate car --runtime onnx", "onnxruntime", "the runtime onnx needs onnxruntime"),
        ("generate car --runtime openvino", "openvino", "the runtime openvino needs openvino"),
        ("generate car --runtime openvino --precision int8", "nncf", "the runtime openvino needs nncf"),
        ("convert emoji made --runtime openvino", "openvino", "the runtime openvino needs openvino"),
        (
            "convert emoji made --to onnx",
            "onnxscript",
            "ONNX export needs (onnx and )?onnxscript",
        ),  # both, where neither is here
        ("serve --port 0", "fastapi", "latentdiff serve needs fastapi"),
        ("app --port 0", "fastapi", "latentdiff app needs fastapi"),
    ],
)
def test_without_an_extra(
    command: str,
    missing: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot be found is named, and the command that installs it; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTDIFF_DEBUG", "0")
    monkeypatch.setitem(sys.modules, missing, None)
    assert run_program(monkeypatch, *command.split()) == 2
    error = capsys.readouterr().err
    if "openvino" in said and missing == "nncf" and "needs openvino" in error:
        pytest.skip("openvino is not installed")  # asked for first
    assert re.search(said, error)
    assert "; install with: pip install " in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("convert emoji made --to onnx", "onnxscript"),
        ("convert emoji made --runtime onnx", "onnxruntime"),
        ("convert emoji made --runtime openvino --dtype int8", "nncf"),
        ("generate car --runtime openvino", "openvino"),
        ("generate car --runtime onnx --precision int8", "onnxruntime"),
        ("many prompts.txt -o made --runtime openvino", "openvino"),
        ("serve --runtime openvino", "openvino"),
    ],
)
def test_an_extra_is_asked_for_before_a_model_is_loaded(command: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a car\n")
    code = f"""
import sys
sys.modules[{missing!r}] = None
sys.argv = ["latentdiff", *{command.split()!r}]
from latentdiff.__main__ import main
try:
    main()
except SystemExit as end:
    print(end.code, [name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "install with: pip install" in ended.stderr
    code, loaded = ended.stdout.splitlines()[-1].split(maxsplit=1)
    assert code == "2"
    assert "Loading" not in ended.stderr
    assert loaded == "[]" or command.startswith("convert")  # which looks at what is asked of which model first
