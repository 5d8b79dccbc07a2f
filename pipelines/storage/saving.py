"""Writing a pipeline folder whole, so that plain diffusers loads and draws from it."""

import json
import os
import re
import shutil
from pathlib import Path


def tidy_configs(folder: Path) -> None:
    """Make the saved components' configs independent of this machine.

    The place where a component was loaded from is removed. The text encoder's config gets float32 as its precision:
    without another request diffusers loads its networks in float32, but transformers uses the precision in the config,
    and a folder in half precision would be loaded in two precisions and could not draw.
    """
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if file.parent.name == "text_encoder":
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def move_into(new: Path, folder: Path, variant: str | None) -> None:
    """Move all files below `new` to the same places below `folder`, the index last, each whole.

    Weight files of an earlier save that the new files replace are removed; nothing else of `folder` is touched.
    """
    files = sorted(file for file in new.rglob("*") if file.is_file())
    files.sort(key=lambda file: file.name == "model_index.json")
    for file in files:
        target = folder / file.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    suffix = "" if variant is None else re.escape(f".{variant}")
    weights = re.compile(
        rf"(diffusion_pytorch_model|model){suffix}(-\d+-of-\d+)?\.safetensors(\.index\.json)?|"
        rf"(diffusion_pytorch_model|model)\.safetensors\.index{suffix}\.json"
    )
    written = {folder / file.relative_to(new) for file in files}
    for part in {target.parent for target in written if target.parent != folder}:
        for old in part.iterdir():
            if old not in written and weights.fullmatch(old.name):
                old.unlink()
    shutil.rmtree(new)
