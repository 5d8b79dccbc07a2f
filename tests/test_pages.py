"""The pages of docs/ and the README: what they tell readers to type can be typed, and their links lead somewhere."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from pages import ROOT, Command, Snippet, pages, typed
from parsed import MENTIONS, of_latentdiff, parse

from latentdiff.training.commands.settings import Kind, settings_of
from latentdiff.training.commands.settings_arguments import load_settings

SETTINGS = {"autoencoder", "data", "model", "output", "prompts"}
"""Options that are settings too."""


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in pages()])
def test_commands_have_these_options_and_settings(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in typed(page):
        if isinstance(command, Command):
            try:
                check(command.words)
            except Exception as error:
                if not command.spoken or type(error).__name__ not in MENTIONS:
                    raise


def check(words: list[str]) -> None:
    for name in words:  # files that have to be there
        if name.endswith((".yaml", ".py", ".csv", ".txt")) and "/" not in name:
            Path(name).touch()
    called = of_latentdiff(words)
    if called is None:
        check_other(words)
        return
    name, given = parse(*called)
    if name in tuple(Kind) and given.get("overrides"):
        fields = settings_of(name).model_fields
        options = {key: value for key, value in given.items() if key in SETTINGS and value is not None}
        options |= {key: "x" for key in ("data", "output") if key not in options and fields[key].is_required()}
        if given.get("method"):
            options["method"] = str(given["method"])
        load_settings(settings_of(name), None, [one.replace("METHOD", "lcm") for one in given["overrides"]], **options)


def check_other(words: list[str]) -> None:
    """Of other programs: our extras, modules and files that are named are there."""
    if words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        named = {name for word in words for name in re.findall(r"^\.\[(.*)\]$", word)}
        assert {name for names in named for name in names.split(",")} <= set(project["optional-dependencies"])
    elif "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1])
    else:
        assert words[0] in ("pytest", "bash", "python", "mkdocs", "accelerate", "torchrun", "srun", "sbatch", "export")
        assert all((ROOT / word).exists() for word in words if word.startswith("benchmarks/"))


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in pages()])
def test_snippets_are_python(page: Path) -> None:
    for snippet in typed(page):
        if isinstance(snippet, Snippet):
            compile(snippet.text, page.name, "exec")


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()])
def test_links_lead_somewhere(page: Path) -> None:
    """In the repository, as its readers see it; those of the site are looked at when it is built."""
    generated = {"reference/commands.md", *(f"reference/settings-{kind}.md" for kind in Kind)}
    for link in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        assert target.exists() or target.relative_to(ROOT / "docs").as_posix() in generated, link


def test_messages_are_those_of_the_program() -> None:
    """Each message of the page of troubles is in the code, word by word between its values."""
    folders = (ROOT / name for name in ("latentdiff", "pipelines", "training"))
    code = "".join(file.read_text(encoding="utf-8") for folder in folders for file in folder.rglob("*.py"))
    code = re.sub(r'"\n\s+f?"', "", code)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 25
    assert [part for message in messages for part in message.split(" ... ") if part.strip(". ") not in code] == []
