"""Importing is cheap, and nothing happens by it."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from latentdiff.deferred import is_tried
from latentdiff.imports import collector_paused, load_module

HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "open_clip", "accelerate", "typer")


def loaded_after(code: str, *suspects: str) -> list[str]:
    program = f"{code}\nimport sys\nprint(*[name for name in {suspects!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import latentdiff; dir(latentdiff); latentdiff.__version__", *HEAVY) == []


def test_the_command_line_loads_nothing_heavy() -> None:
    code = "import latentdiff.cli, latentdiff.text, latentdiff.pipelines, latentdiff.training.cli"
    assert loaded_after(code, *(name for name in HEAVY if name != "typer")) == []


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from latentdiff.cli import main
sys.argv = ["latentdiff", "generate", "--help"]
sys.stdout, stdout = sys.stderr, sys.stdout
try:
    main()
except SystemExit:
    sys.stdout = stdout
"""
    assert loaded_after(code, *(name for name in HEAVY if name != "typer")) == []


@pytest.mark.slow
def test_the_pipeline_does_not_need_open_clip_or_diffusers_stable_diffusion() -> None:
    code = "import latentdiff; latentdiff.TextToImagePipeline"
    unwanted = ("open_clip", "datasets", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    assert loaded_after(code, *unwanted) == []


NOT_FOR_A_DRAWING = (
    "open_clip",
    "datasets",
    "gradio",
    "pandas",
    "matplotlib",
    "sklearn",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorboard",
    "wandb",
    "torchmetrics",
    "latentdiff.training.loop",
    "diffusers.guiders",
    "diffusers.pipelines.onnx_utils",
    "diffusers.pipelines.stable_diffusion",
    "transformers.models.clip.modeling_clip",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "peft",
    "scipy",
    "sympy",
)
MODULES = 2300
"""That a drawing may import; without `imports_deferred` they were 4290."""


@pytest.mark.slow
def test_a_drawing_imports_what_it_needs(tmp_path: Path) -> None:
    if not is_tried():
        pytest.skip("with these versions of torch, diffusers and transformers nothing is deferred")
    code = f"""
import sys
from latentdiff.cli import main
sys.argv = ["latentdiff", "generate", "a red car", "-o", {str(tmp_path / "a.png")!r}]
sys.stdout, stdout = sys.stderr, sys.stdout
try:
    main()
except SystemExit:
    sys.stdout = stdout
print(len(sys.modules))"""
    count, *heavy = loaded_after(code, *NOT_FOR_A_DRAWING)
    assert (tmp_path / "a.png").is_file()
    assert heavy == []
    assert int(count) < MODULES


def test_the_collector_rests_while_large_modules_are_imported() -> None:
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
        assert load_module("latentdiff.terminal") is sys.modules["latentdiff.terminal"]
        assert not gc.isenabled()  # as it was
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError):
        load_module("latentdiff.nothing")
    assert gc.isenabled()


def test_unknown_names_are_attribute_errors() -> None:
    import latentdiff

    with pytest.raises(AttributeError, match="nothing"):
        latentdiff.nothing  # noqa: B018
