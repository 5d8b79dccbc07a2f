"""What the site has besides the pages here: commands, settings, and files of the repository that pages link to."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

if TYPE_CHECKING:
    from latentdiff.training.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)")
SPOKEN = re.compile(r"\b[a-z][a-z0-9_]*\b(?:=\[?[\w-]+(?:\.\d+)*\]?)?")
"""A setting in a sentence, perhaps with a value."""
PICTURE = re.compile(r"^(!\[[^\]]*\]\(([^)\s]+\.png)\))$", re.MULTILINE)
OUTSIDE = "source"
"""The folder of the site with copies of what lies outside docs/."""
SHOWN = {".py", ".yaml", ".yml", ".toml", ".txt", ".png", ".md", ""}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the files that pages link to."""
    for name, text in {**commands_page(), **settings_pages()}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    seen: set[str] = set()
    for place in ("CHANGELOG.md", "CONTRIBUTING.md", *linked_outside(files)):
        add_outside(place, files, config, seen)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of docs/ lead to the site's copies, and pictures to themselves at their own size."""
    here = in_repository(page.file.src_uri)

    def lead(found: re.Match[str]) -> str:
        target = in_site(resolve(here, found[1]))
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(lead, PICTURE.sub(r"[\1](\2)", markdown))


def commands_page() -> dict[str, str]:
    """The reference of the command line, from the commands."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from latentdiff import cli

    command = get_command(cli.application())
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="latentdiff", title="Commands")
    return {"commands": told_whole(text, command)}


def told_whole(text: str, group: Any) -> str:
    """With the whole first sentence of each command in the lists of commands, where `get_docs_for_click` cuts it."""
    for name, command in group.commands.items():
        cut, whole = (f"* `{name}`: {command.get_short_help_str(limit)}\n" for limit in (45, 400))
        text = text.replace(cut, whole)
        if hasattr(command, "commands"):
            text = told_whole(text, command)
    return text


def settings_pages() -> dict[str, str]:
    """A page for each training command: every setting with meaning, type, default, and when to change it."""
    from latentdiff.training.commands.settings import Kind, full_name, settings_of

    pages = {}
    for kind in Kind:
        title = f"Settings of `latentdiff {full_name(kind)}`"
        how = "Given as `key=value` after the command, or in a YAML file with `--config` ([how](settings.md))."
        pages[f"settings-{kind}"] = "\n".join([f"# {title}\n\n{how}\n", *entries(settings_of(kind))])
    return pages


def entries(kind: "type[Settings]") -> Iterator[str]:
    """Of each setting a heading, so that it can be linked to, and what is said of it."""
    from latentdiff.training.settings.describe import rows

    found = list(rows(kind))
    names = {row.name for row in found}
    for row in found:
        default = "" if row.default is None else f" Default: `{row.default}`."
        kept = " A run that goes on has to keep it." if row.name in getattr(kind, "fixed", ()) else ""
        yield f"## `{row.name}`\n\n{row.meaning[:1].upper()}{row.meaning[1:]}.\n\n*{row.type}*.{default}{kept}\n"
        yield f"**When to change it.** {linked(row.when, names)}\n"


def linked(text: str, names: set[str]) -> str:
    """With what is typed as code, and settings that are spoken of as links to their entries on the page."""

    def lead(found: re.Match[str]) -> str:
        name = found[0].partition("=")[0]
        spoken = name in names and ("_" in name or "=" in found[0])
        return f"[`{found[0]}`](#{name})" if spoken else f"`{found[0]}`" if "=" in found[0] else found[0]

    parts = re.split(r"'((?:latentdiff|hf) [^']*)'", text)  # every second one is a command
    return "".join(f"`{part}`" if i % 2 else SPOKEN.sub(lead, part) for i, part in enumerate(parts))


def linked_outside(files: Files) -> Iterator[str]:
    """What pages in docs/ link to outside of it, from the repository's root."""
    for file in files.documentation_pages():
        if file.generated_by is None:
            for found in LINK.findall(file.content_string):
                target = resolve(in_repository(file.src_uri), found)
                if not target.startswith("docs/"):
                    yield target


def add_outside(place: str, files: Files, config: MkDocsConfig, seen: set[str]) -> None:
    """Copy a file of the repository, and what it links to in turn; of a folder its README, or a list of its files."""
    target = in_site(place)
    path = ROOT / place
    if target in seen or not path.exists() or target.startswith("../") or not target.startswith(OUTSIDE):
        return
    seen.add(target)
    if target.endswith(".md"):
        file = path if path.is_file() else path / "README.md"
        text = file.read_text(encoding="utf-8") if file.is_file() else listing(path)
        files.append(File.generated(config, target, content=text))
        for found in LINK.findall(text):
            add_outside(resolve(in_repository(target), found), files, config, seen)
    else:
        files.append(File.generated(config, target, abs_src_path=str(path)))


def listing(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix in SHOWN)
    return "\n".join([f"# {folder.relative_to(ROOT)}", "", *(f"- [{name}]({name})" for name in names), ""])


def resolve(here: str, link: str) -> str:
    """Where a link in the file `here` leads, from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def in_repository(page: str) -> str:
    """The file that a page of the site is of, from the repository's root."""
    return page.removeprefix(f"{OUTSIDE}/") if page.startswith(f"{OUTSIDE}/") else f"docs/{page}"


def in_site(place: str) -> str:
    """Where the site has a file of the repository; folders and their READMEs are one page."""
    if place == "README.md":
        return "index.md"
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    path = ROOT / place
    return f"{OUTSIDE}/{place}/README.md" if path.is_dir() else f"{OUTSIDE}/{place}"
