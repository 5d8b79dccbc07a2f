"""Make the README's links absolute, for PyPI, which knows no other files: python absolute_links.py URL TAG.

URL is the repository's, such as https://github.com/OWNER/NAME. The README is changed in place: build from a copy.
"""

import re
import sys
from pathlib import Path

RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def absolute(text: str, url: str, tag: str) -> str:
    """Pictures lead to the file itself, other links to the page that shows it."""

    def lead(found: re.Match[str]) -> str:
        picture, words, place = found.groups()
        return f"{picture}[{words}]({url}/{'raw' if picture else 'blob'}/{tag}/{place})"

    return RELATIVE.sub(lead, text)


if __name__ == "__main__":
    readme = Path("README.md")
    readme.write_text(absolute(readme.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
