"""``latentdiff cache``."""

import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.terminal import bytes_text, say

if TYPE_CHECKING:
    from latentdiff.interchange.shared_cache import Shard

UNKNOWN = "(not known)"


def cache(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A dataset or a model: only what was made of it.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete it; what running programs use stays.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
) -> None:
    """Show what trainings keep of pictures and captions that they have encoded, and what --runtime made of models, or
    clear it away.

    latentdiff cache

    latentdiff cache pictures --clear

    It is in your cache folder (LATENTDIFF_CACHE names another one) and holds at most 20 GB (LATENTDIFF_CACHE_GB): what
    was used longest ago goes first. What is missing is made again when it is needed.
    """
    from latentdiff.interchange.cache_folder import shared_folder
    from latentdiff.interchange.shared_cache import delete, shards, size_limit

    root, most = shared_folder(), size_limit()
    groups: dict[tuple[str, str, str], list[Shard]] = defaultdict(list)
    for shard in shards(root):
        groups[description(shard)].append(shard)
    found = {key: some for key, some in groups.items() if name is None or is_of(name, key)}
    everything = [shard for some in groups.values() for shard in some]
    if not everything:
        return say(f"{root}: nothing is in the cache.")
    if not found:
        names = ", ".join(sorted({one for _, *both in groups for one in both} - {UNKNOWN}))
        raise ValueError(f"{name}: nothing in the cache was made of it; there is something of {names}")
    say(f"{root}: {size_text(everything)}, and at most {most / 1e9:g} GB")
    for (what, data, model), some in sorted(found.items()):
        used = time.strftime("%Y-%m-%d", time.localtime(max(shard.used for shard in some)))
        of = f"for {data}, of {model}" if what == "graphs" else f"of {data}, by {model}"
        say(f"  {size_text(some):>8}  used {used}  {what} {of}")
    if not clear:
        return None
    chosen = [shard for some in found.values() for shard in some]
    if not yes:
        typer.confirm(f"Delete {size_text(chosen)}?", abort=True)
    freed, kept = delete(chosen)
    say(f"{bytes_text(freed)} deleted.")
    if kept:
        say(f"{size_text(kept)} stay, for running trainings use them, or pipelines with a runtime.")
    return None


def description(shard: "Shard") -> tuple[str, str, str]:
    """What was encoded, of which data, by which model."""
    labels = shard.labels()
    return shard.kind, labels.get("data") or UNKNOWN, labels.get("model") or UNKNOWN


def is_of(name: str, key: tuple[str, str, str]) -> bool:
    """Whether `name` is the data or the model of a group: as it is shown, as a path from here, or its last part."""
    return any(one in (name, str(Path(name).absolute())) or Path(one).name == name for one in key[1:])


def size_text(some: "list[Shard]") -> str:
    return bytes_text(sum(shard.size for shard in some))
