"""What the README and the pages of docs/ tell readers to type: the blocks, commands and snippets in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPOKEN = re.compile(r"`(latentdiff [^`\n]*(?:\n[^`\n]+)?)`")
PLACEHOLDER = re.compile(r"\.\.\.|\b(?:VARIANCE|URL)\b")
SHELL = ("sh", "bash")


class Command(NamedTuple):
    """What is typed in a shell."""

    words: list[str]
    into: str
    """The file that its output goes to; empty: none."""
    spoken: bool
    """It stands in a sentence or a table, which need not give all that it takes."""


class Snippet(NamedTuple):
    """Lines of Python."""

    text: str


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/reference").glob("*.md"))]


def typed(page: Path) -> Iterator[Command | Snippet]:
    """All that a page tells its readers to type, in its order."""
    text, end = page.read_text(encoding="utf-8"), 0
    for fence in FENCE.finditer(text):
        yield from spoken(text[end : fence.start()])
        indent, language, block = fence.groups()
        block = re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
        if language == "python":
            yield Snippet(block)
        elif language in SHELL:
            yield from commands(block)
        end = fence.end()
    yield from spoken(text[end:])


def commands(text: str) -> Iterator[Command]:
    """The commands of a shell block, split into words; those after && too."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            if command:
                into = command[-1] if command[-2:-1] == [">"] else ""
                yield Command(command[:-2] if into else command, into, False)


def spoken(text: str) -> Iterator[Command]:
    """Commands of latentdiff within sentences and tables; none that leave something out."""
    for found in SPOKEN.findall(text):
        if not PLACEHOLDER.search(found):
            yield Command(shlex.split(found), "", True)
