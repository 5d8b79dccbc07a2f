"""``latentdiff models``."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.pipelines.registry import Kind, kind_saved_as
from latentdiff.terminal import bytes_text, say

DEEPEST = 4  # folders within folders that are looked into
INDEX = "model_index.json"
ORIGINAL_PARTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")  # of Stable Diffusion's files


@dataclass(frozen=True)
class Found:
    """A model's folder or single file. name: what ``--model`` takes."""

    name: str
    place: Path


def models(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look for models besides.")] = Path("."),
) -> None:
    """List the models that are here, packaged, in the hub's cache, in folders and files, and how to draw with each.

    latentdiff models runs
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    from latentdiff.interchange.folders import packaged_models

    packaged = [Found(name, place) for name, place in packaged_models().items()]
    here = [Found(shown(place), place) for place in model_places(folder)]
    for title, found in (("In the package", packaged), ("In the hub's cache", cached()), (f"In {folder}", here)):
        if found:
            say(f"{title}:")
        for one in found:
            try:
                lines = description(one)
            except (OSError, ValueError) as error:
                lines = [f"{one.name}: cannot be used: {error}"]
            for line in lines:
                say(f"  {line}")
    say("--model takes any 'owner/name' of the hub too; 'latentdiff finetune' makes models of your pictures.")


def description(found: Found) -> list[str]:
    """Name, kind, size, resolution and steps of a model, and a command that draws with it.

    Raises:
        OSError, ValueError: a file that says so is damaged.
    """
    index = index_of(found.place)
    kind = kind_saved_as(str(index.get("_class_name")))
    resolution, _ = model_shape(found.place)
    steps = dict(index.get("_generation_defaults") or {}).get("num_inference_steps")
    facts = [
        str(index.get("_class_name")) if kind is None else kind.name,
        bytes_text(size_of(found.place, index)),
        "" if resolution is None else f"{resolution} x {resolution} pixels",
        "" if steps is None else f"{steps} steps",
    ]
    how = "there is no such pipeline here" if kind is None else drawing_command(found.name, kind, index)
    return [f"{found.name}: {', '.join(filter(None, facts))}", f"    {how}"]


def drawing_command(name: str, kind: Kind, index: dict[str, Any]) -> str:
    """What draws with a model, on the command line or else from Python."""
    model = f"--model {shlex.quote(name)}"
    if kind.conditioned_by == "picture":
        return f"{kind.name}.from_pretrained({name!r})"
    if kind.conditioned_by == "none":
        return f"latentdiff generate {model} -n 4"
    if kind.conditioned_by == "class":
        names = index.get("id2label")
        label = str(next(iter(names.values()), 0)).partition(",")[0] if isinstance(names, dict) else "0"
        return f"latentdiff generate {model} --class {shlex.quote(label)} -n 4"
    pictures = "".join(f" --{one.removesuffix('_image')} {one.removesuffix('_image')}.png" for one in kind.pictures)
    return f'latentdiff generate "a red car" {model}{pictures}'


def cached() -> list[Found]:
    """The pipelines in the hub's local cache, of each the revision that came last."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repository in repositories:
        for revision in sorted(repository.revisions, key=lambda one: one.last_modified, reverse=True)[:1]:
            if repository.repo_type == "model" and (revision.snapshot_path / INDEX).is_file():
                found.append(Found(repository.repo_id, revision.snapshot_path))
    return sorted(found, key=lambda one: one.name)


def model_places(root: Path) -> Iterator[Path]:
    """The folders below `root`, and itself, that hold a pipeline, and the single files beside them that do; hidden
    folders and links to folders are left out.
    """
    for place, folders, files in os.walk(root):
        depth = len(Path(place).relative_to(root).parts)
        if INDEX in files:
            yield Path(place)
            folders.clear()
            continue
        if depth >= DEEPEST:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(Path(place, name) for name in files if name.endswith(".safetensors")):
            if is_model(file):
                yield file


def is_model(file: Path) -> bool:
    """Whether a safetensors file holds a whole model, and no LoRA, network or cache; no weights are read."""
    from safetensors import SafetensorError, safe_open

    from latentdiff.interchange.packed import KEY

    try:
        with safe_open(file, "np") as stream:
            names = stream.keys()
            if KEY in (stream.metadata() or {}):
                return True
            return all(any(name.startswith(part) for name in names) for part in ORIGINAL_PARTS)
    except (OSError, SafetensorError):  # which may be anything
        return False


def index_of(place: Path) -> dict[str, Any]:
    """The index of a pipeline's folder or single file; in Stable Diffusion's layout the latter has none, and its kind
    is told by the pictures that its UNet takes.

    Raises:
        OSError, ValueError: it is damaged.
    """
    from latentdiff.interchange.folders import read_json
    from latentdiff.interchange.packed import packed_index

    if place.is_dir():
        return read_json(place / INDEX)
    found = packed_index(place)
    if found is None:
        from latentdiff.pipelines.storage.converting import checkpoint_kind

        found = {"_class_name": checkpoint_kind(place).saved_as[0]}
    return found


def shown(place: Path) -> str:
    """A folder or file as ``--model`` takes it: not as a name that a packaged model or one on the hub may have."""
    from latentdiff.interchange.folders import packaged_models

    return f"./{place}" if str(place) in packaged_models() else str(place)


def size_of(place: Path, index: dict[str, Any]) -> int:
    """Bytes of the components that an index names."""
    if place.is_file():
        return place.stat().st_size
    parts = [place / name for name, value in index.items() if isinstance(value, list)]
    return sum(file.stat().st_size for part in parts if part.is_dir() for file in part.rglob("*") if file.is_file())


def model_shape(place: Path) -> tuple[int | None, int | None]:
    """A pipeline's resolution and the pixels per latent, or per patch of latents, as far as its folder, or single file,
    says; None for what it does not.
    """
    from latentdiff.interchange.folders import DENOISERS

    networks, autoencoders = (
        [config for part in parts if (config := config_of(place, part)) is not None]
        for parts in (DENOISERS, ("vae", "vqvae"))
    )
    if not networks:
        return None, None
    factor = 2 ** (len(autoencoders[0].get("block_out_channels", [0])) - 1) if autoencoders else 1
    size, patch = networks[0].get("sample_size"), networks[0].get("patch_size")
    side = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    return (side * factor if isinstance(side, int) else None), factor * (patch if isinstance(patch, int) else 1)


def config_of(place: Path, part: str) -> dict[str, Any] | None:
    """The config of a component in a pipeline's folder, or single file of our own layout; None if there is none."""
    from latentdiff.interchange.folders import read_json
    from latentdiff.interchange.packed import packed_content
    from latentdiff.interchange.user_files import parse_json_object

    name = f"{part}/config.json"
    if place.is_dir():
        return read_json(place / name) if (place / name).is_file() else None
    text = ((packed_content(place) or {}).get("texts") or {}).get(name)
    return None if text is None else parse_json_object(text, f"{place}: its {name}")
