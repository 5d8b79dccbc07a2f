"""Whether there can be such data, seen before anything heavy is loaded to read it."""

import difflib
import os
from pathlib import Path

from latentdiff.interchange.hub import HubError, check_on_hub


def check_data(source: str) -> None:
    """Raises FileNotFoundError if `source` is neither here nor, as far as that is quickly known, a dataset's name.

    source: a folder, shards, or the name of a dataset on the hub. Shards are not looked at.
    """
    folder = Path(source).expanduser()
    if "://" in source or source.endswith(".tar") or folder.is_dir():
        return
    check_name(source)
    try:
        if not in_datasets_cache(source):
            check_on_hub(source, "dataset")
    except HubError as error:
        near = folder_like(folder)
        hint = f"did you mean {near!r}?" if near else f"as a dataset, {error}"
        raise FileNotFoundError(f"{source}: no such folder; {hint}") from None


def check_name(source: str) -> None:
    """Raises FileNotFoundError for what is no folder and cannot be a dataset's name."""
    folder = Path(source).expanduser()
    if os.path.isabs(folder) or source.startswith(".") or folder.exists():
        near = None if folder.exists() else folder_like(folder)
        hint = f"did you mean {near!r}?" if near else "--data takes a folder of pictures, shards or a dataset name"
        raise FileNotFoundError(f"{source}: not a folder; {hint}")


def folder_like(folder: Path) -> str | None:
    """A folder beside it whose name is nearly the same."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.8)
    return str(folder.with_name(near[0])) if near else None


def in_datasets_cache(name: str) -> bool:
    """Whether `datasets` may have prepared one of that name before; it changes case and underscores."""
    from huggingface_hub.constants import HF_HOME

    def plain(text: str) -> str:
        return text.lower().replace("_", "")

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    wanted = plain(name.replace("/", "___"))
    return cache.is_dir() and any(plain(path.name) == wanted for path in cache.iterdir())
