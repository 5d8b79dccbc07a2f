"""Importing is cheap, and nothing happens by it."""

import subprocess
import sys

import pytest

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


def test_unknown_names_are_attribute_errors() -> None:
    import latentdiff

    with pytest.raises(AttributeError, match="nothing"):
        latentdiff.nothing  # noqa: B018
