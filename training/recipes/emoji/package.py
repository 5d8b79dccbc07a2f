"""Puts a trained emoji model into the package: half precision, shards under 16 MiB, the model card with its figures.

    python -m latentdiff.training.recipes.emoji.package MODEL latentdiff/weights/emoji --table OUT/table.md

The card must say what it has to: every icon set that the recipe draws from, with its licence, and what was measured.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from latentdiff.pipelines import TextToImagePipeline

from .fetch import ICON_SETS

SHARD = 16 * 2**20
LARGEST = 100_000_000
TABLE = "<!-- evaluation -->"  # where the card has the table of figures
SECTIONS = ("Data and licences", "Training", "Figures", "What it cannot do")


def read_card(card: Path, table: Path | None = None) -> str:
    """The text of a model card, with the table that `evaluate` wrote in its place.

    Raises:
        FileNotFoundError: there is no such card or table.
        ValueError: the card has a place and there is no table for it, or the other way round; or it lacks its front
            matter, a section, or an icon set of the recipe with its licence.
    """
    for file in filter(None, (card, table)):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: there is no such file")
    text = card.read_text(encoding="utf-8")
    if table is None and TABLE in text:
        raise ValueError(f"{card}: {TABLE} waits for figures; give the table.md that evaluate wrote with --table")
    if table is not None and TABLE not in text:
        raise ValueError(f"{card} has no {TABLE} to put the figures of {table} in")
    if not re.match(r"---\n(.*\n)*?license: \S+\n(.*\n)*?---\n", text):
        raise ValueError(f"{card} does not begin with front matter that names the license")
    for section in SECTIONS:
        if f"\n## {section}\n" not in text:
            raise ValueError(f"{card} has no section {section!r}")
    for icons in ICON_SETS:
        rows = [line for line in text.splitlines() if re.search(rf"[`/]{re.escape(icons.short_name)}`", line)]
        if not any(f" {icons.licence} " in row for row in rows):
            raise ValueError(f"{card} does not name the icon set {icons.name} with its licence, {icons.licence}")
    return text if table is None else text.replace(TABLE, table.read_text(encoding="utf-8").strip())


def package(model: str, output: Path, card: str) -> int:
    """Write the pipeline in `model` as `output`, whole or not at all; an earlier one is replaced. Returns its bytes.

    `card` is the text of its README.md.

    Raises:
        ValueError: the folder would be larger than 100 MB, or a file larger than 16 MiB.
    """
    pipeline = TextToImagePipeline.from_pretrained(model, torch_dtype=torch.float16)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        pipeline.save_pretrained(folder, max_shard_size="15MB")
        (folder / "README.md").write_text(card, encoding="utf-8")
        sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        for file, size in sizes.items():
            if size > SHARD:
                raise ValueError(f"{file.relative_to(folder)}: {size} bytes, more than {SHARD}")
        if sum(sizes.values()) > LARGEST:
            raise ValueError(f"the pipeline has {sum(sizes.values())} bytes, more than {LARGEST}")
        if output.exists():
            os.replace(output, Path(temporary) / "old")
        os.replace(folder, output)
    return sum(sizes.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="package", description="Put a trained emoji model into the package.")
    parser.add_argument("model", help="the pipeline folder that 'latentdiff train denoiser' wrote")
    parser.add_argument("output", type=Path, help="folder for the packaged model, such as latentdiff/weights/emoji")
    parser.add_argument("--card", type=Path, default=Path(__file__).with_name("MODEL_CARD.md"))
    parser.add_argument("--table", type=Path, help="table.md of evaluate, for the card")
    options = parser.parse_args(arguments)
    try:
        size = package(options.model, options.output, read_card(options.card, options.table))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"package: {error}")
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
