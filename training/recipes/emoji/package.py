"""Puts a trained emoji model into the package: half precision, shards under 16 MiB, the model card.

python -m latentdiff.training.recipes.emoji.package MODEL latentdiff/weights/emoji
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from latentdiff.pipelines import TextToImagePipeline

SHARD = 16 * 2**20
LARGEST = 100_000_000


def package(model: str, output: Path, card: Path) -> int:
    """Write the pipeline in `model` as `output`, whole or not at all; an earlier one is replaced. Returns its bytes.

    Raises:
        ValueError: the folder would be larger than 100 MB, or a file larger than 16 MiB.
    """
    pipeline = TextToImagePipeline.from_pretrained(model, torch_dtype=torch.float16)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        pipeline.save_pretrained(folder, max_shard_size="15MB")
        shutil.copyfile(card, folder / "README.md")
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
    options = parser.parse_args(arguments)
    try:
        size = package(options.model, options.output, options.card)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"package: {error}")
    print(f"{options.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
