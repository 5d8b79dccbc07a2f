"""What is installed is what is here."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_folder_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    names = set()
    for top, name in (
        ("latentdiff", "latentdiff"),
        ("pipelines", "latentdiff.pipelines"),
        ("training", "latentdiff.training"),
    ):
        assert settings["package-dir"][name] == top
        for file in (ROOT / top).rglob("__init__.py"):
            names.add(".".join([name, *file.parent.relative_to(ROOT / top).parts]))
    assert names == set(settings["packages"])


def test_packaged_weights_are_small_and_whole() -> None:
    """No file of 16 MiB and more, no model over 100 MB, nothing that would have to be unpickled."""
    for index in (ROOT / "latentdiff" / "weights").glob("*/model_index.json"):
        sizes = {file: file.stat().st_size for file in index.parent.rglob("*") if file.is_file()}
        assert max(sizes.values()) < 16 * 2**20
        assert sum(sizes.values()) < 100_000_000
        assert {file.suffix for file in sizes} <= {".json", ".md", ".safetensors", ".txt"}
