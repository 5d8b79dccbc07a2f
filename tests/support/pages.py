"""What the README and the pages of docs/ tell readers to type: the blocks, commands and snippets in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"(?:<!-- (not run|needs): ([^\n]*?) -->\n)?^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPOKEN = re.compile(r"`(latentdiff [^`\n]*(?:\n[^`\n]+)?)`")
PLACEHOLDER = re.compile(r"\.\.\.|\b(?:VARIANCE|URL)\b")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    text: str
    not_run: str
    """Why a test only reads it; empty: a test runs it."""
    needs: str
    """A package without which it is only read."""


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/reference").glob("*.md"))]


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a language in a page."""
    found = []
    for mark, why, indent, name, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if name == language:
            text = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
            found.append(Block(page.name, text, why if mark == "not run" else "", why if mark == "needs" else ""))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, split into words; those after && too, without where output goes to."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            if command := words[: words.index(">") if ">" in words[:end] else end]:
                yield command
            words = words[end + 1 :]


def spoken(page: Path) -> Iterator[list[str]]:
    """Commands of latentdiff within sentences and tables of a page; none that leave something out."""
    for found in SPOKEN.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not PLACEHOLDER.search(found):
            yield shlex.split(found)
