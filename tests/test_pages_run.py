"""The README's and the first pages' commands and snippets do what they say, with fewer steps of training."""

from collections.abc import Callable
from pathlib import Path

import pytest
from discs import save_discs
from pages import ROOT, blocks, commands
from program import run_program

pytestmark = pytest.mark.slow

PAGES = ("README.md", "docs/gallery.md")  # the others have commands like these
SNIPPETS = ("README.md", "docs/index.md", "docs/drawing.md", "docs/reference/training.md")
FEWER = {"max_steps": "1", "batch_size": "1", "resolution": "32", "warmup_steps": "0"}
SERVING = ("app", "serve")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Runs the program in a folder that has pictures, and a picture that was drawn."""
    monkeypatch.chdir(tmp_path)
    save_discs(tmp_path / "pictures")

    return lambda words: run_program(monkeypatch, *words[1:])


def shortened(words: list[str]) -> list[str]:
    """A training with the settings of `FEWER`; other commands as they are."""
    if words[1] != "finetune":
        return words
    kept = [word for word in words if word.partition("=")[0] not in FEWER]
    return kept + [f"{key}={value}" for key, value in FEWER.items()]


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, run: Callable[[list[str]], int]) -> None:
    typed = [words for block in blocks(ROOT / page, "sh") if not block.not_run for words in commands(block.text)]
    ours = [words for words in typed if words[0] == "latentdiff" and words[1] not in SERVING]
    assert len(ours) >= 1
    for words in ours:
        assert run(shortened(words)) == 0, words
        if "-o" in words and "--separate" not in words:
            assert Path(words[words.index("-o") + 1]).is_file()


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_run(page: str, run: Callable[[list[str]], int]) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(ROOT / page, "python"):
        if not block.not_run:
            exec(compile(block.text, page, "exec"), names)
    assert len(names) > 2
