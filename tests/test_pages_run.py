"""What the README and the pages of docs/ tell readers to type does what they say, typed in their order."""

import re
from pathlib import Path

import pytest
from pages import ROOT, Snippet, pages, typed
from reader import NOT_HERE, Reader

from latentdiff.diffusion import process
from latentdiff.pipelines import registry

PAGES = [page for page in pages() if next(typed(page), None)]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "KINDS", [*registry.KINDS])
    monkeypatch.setattr(process, "PROCESSES", [*process.PROCESSES])
    return Reader(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_all_that_a_page_says_can_be_typed(page: Path, reader: Reader) -> None:
    with reader:
        for what in typed(page):
            reader.type(what)
    assert reader.failed == []
    if reader.missing:
        pytest.skip(f"all else was run, but for what needs {', '.join(sorted(reader.missing))}")


@pytest.mark.parametrize("pattern", NOT_HERE)
def test_what_is_not_run_is_still_said(pattern: str) -> None:
    said = [what for page in PAGES for what in typed(page)]
    assert any(re.search(pattern, what.text if isinstance(what, Snippet) else " ".join(what.words)) for what in said)
