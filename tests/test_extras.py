"""Advice to install names packages that there are, and not this one, which no index has."""

import re
from importlib.metadata import requires

from latentdiff.extras import how_to_install


def test_how_to_install() -> None:
    assert re.fullmatch(r"pip install 'onnx>=\S+' 'onnxruntime>=\S+' 'onnxscript>=\S+'", how_to_install("onnx"))
    assert how_to_install("heif") == "pip install 'pi-heif>=1.0'"
    assert how_to_install("magic") == "pip install -e '.[magic]' in the folder of this package"
    assert any("extra" in one for one in requires("latentdiff") or ())
