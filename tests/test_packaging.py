"""What is installed is what is here."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("latentdiff", "pipelines", "training")


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


def test_every_file_beside_the_code_is_installed() -> None:
    """All that git knows in the packages' folders, but for what only this repository runs."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    tracked = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=ROOT, check=False, capture_output=True, text=True
    ).stdout
    left = {file for file in tracked.split() if not file.endswith((".py", ".sh")) and not (ROOT / file).is_symlink()}
    for package, patterns in settings["package-data"].items():
        top = next(
            name for name in ("latentdiff.pipelines", "latentdiff.training", "latentdiff") if package.startswith(name)
        )
        folder = ROOT / settings["package-dir"][top] / package.removeprefix(top).strip(".").replace(".", "/")
        left -= {str(file.relative_to(ROOT)) for pattern in patterns for file in folder.glob(pattern)}
    assert left == set()


def test_the_readme_has_no_relative_links_where_it_is_published() -> None:
    spec = importlib.util.spec_from_file_location("absolute_links", ROOT / ".ci/absolute_links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.absolute((ROOT / "README.md").read_text(encoding="utf-8"), "https://host/owner/name", "v1.2.3")
    assert "![Twenty prompts drawn by the packaged model](https://host/owner/name/raw/v1.2.3/docs/grid.png)" in text
    assert "](https://host/owner/name/blob/v1.2.3/docs/training.md)" in text
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []


@pytest.mark.parametrize("folder", ["pipelines", "training"])
def test_type_checkers_see_the_folders_by_their_imported_names(folder: str) -> None:
    link = ROOT / "latentdiff" / folder
    if link.is_symlink():
        assert link.readlink() == Path("..", folder)
        assert link.resolve() == ROOT / folder
    else:  # git made no link, and wrote where it would lead
        assert link.read_text(encoding="utf-8").strip() == f"../{folder}"


def test_no_module_is_loaded_under_two_names() -> None:
    program = """
import sys
from pathlib import Path
import latentdiff.training.commands, latentdiff.pipelines.commands, latentdiff.training.settings
seen = {}
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ("latentdiff", "pipelines", "training"):
        seen.setdefault(Path(module.__file__).resolve(), []).append(name)
assert len(seen) > 5, seen
print(*[names for names in seen.values() if len(names) > 1])
"""
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.split() == []


def test_packaged_weights_are_small_and_whole() -> None:
    """No file of 16 MiB and more, no model over 100 MB, nothing that would have to be unpickled."""
    for index in (ROOT / "latentdiff" / "weights").glob("*/model_index.json"):
        sizes = {file: file.stat().st_size for file in index.parent.rglob("*") if file.is_file()}
        assert max(sizes.values()) < 16 * 2**20
        assert sum(sizes.values()) < 100_000_000
        assert {file.suffix for file in sizes} <= {".json", ".md", ".safetensors", ".txt"}
