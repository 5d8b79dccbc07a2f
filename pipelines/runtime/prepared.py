"""Graphs made once, and kept: in a cache by the content of what they were made of."""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from latentdiff.interchange.atomic import atomic_folder, json_text
from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.fingerprint import component_files, file_digest
from latentdiff.interchange.folders import check_pipeline_folder, packaged_models
from latentdiff.interchange.shared_cache import GRAPHS, GRAPHS_SAY, Hold, exclusive, trim
from latentdiff.models.loras import refuse_loras
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.engine_networks import RuntimeAutoencoder, RuntimeUNet
from latentdiff.pipelines.storage.loading import only_variant

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of what is written; raised when the graphs of an older version must not be used any more."""

NETWORKS = ("unet", "vae", "vqvae")
"""The components that a runtime may run."""

DONE = GRAPHS_SAY
"""In a folder of graphs: what they were made for and, of int8, how far it is from float32."""

_HOLDS: WeakKeyDictionary[Any, Hold] = WeakKeyDictionary()
"""By the networks that read them, the claims to graphs in the cache, which is not cleared of them meanwhile."""


def cache_folder() -> Path:
    """Where graphs are kept."""
    return shared_folder() / GRAPHS


def folder_of(source: Path, runtime: Runtime, variant: str | None = None) -> Path:
    """Where the graphs of a pipeline folder are: in it, if `export` has put them there; or are kept, or will be."""
    parts = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name != GRAPHS)
    kept = parts if runtime.stored == "int8" else [name for name in parts if name in NETWORKS]
    whole = hashlib.sha256(f"{FORMAT} {runtime.name} {runtime.stored}\n".encode())
    for name in kept:
        for file in component_files(source / name, variant):
            whole.update(f"{name}/{file.name} {file_digest(file)}\n".encode())
    name = f"{runtime.name}-{runtime.stored}-{whole.hexdigest()[:32]}"
    return source / GRAPHS / name if ready(source / GRAPHS / name) else cache_folder() / name


def prepare(pipeline: Any, runtime: Runtime, folder: Path, model: str | None = None) -> None:
    """Write the graphs of a pipeline in torch for a runtime, the folder whole or not at all.

    Args:
        model: whose they are; written down with them.

    Raises:
        ValueError: it has LoRAs, or an operation that the runtime does not know.
    """
    from latentdiff.pipelines.runtime.graphs import parts_of, write_graph
    from latentdiff.pipelines.runtime.quantize import quantize, without_pictures

    names = ("unet", "text_encoder")
    refuse_loras({name: getattr(pipeline, name, None) for name in names}, f"run by {runtime.kind.title}")
    if runtime.stored == "int8":
        pipeline = without_pictures(pipeline)
    report: dict[str, Any] = {"runtime": runtime.name, "precision": runtime.stored}
    if model is not None:
        report["model"] = model
    try:
        with atomic_folder(folder) as new:
            for name, make in parts_of(pipeline):
                write_graph(runtime.name, name, make(), new / name, half=runtime.stored == "float16")
            if runtime.stored == "int8":
                report |= quantize(pipeline, runtime, new)
            (new / DONE).write_text(json_text(report), encoding="utf-8")
    except OSError:
        if not ready(folder):  # another process was first
            raise


def ready(folder: Path) -> bool:
    """Whether there are graphs in a folder."""
    return (folder / DONE).is_file()


def networks_of(folder: Path, runtime: Runtime, autoencoder: str = "vae") -> Iterator[tuple[str, Any]]:
    """The networks whose graphs lie in a folder, by the names of a pipeline's components."""
    factor = 1
    if (folder / "vae_decoder").is_dir():
        vae = RuntimeAutoencoder(runtime, folder)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        yield autoencoder, vae
    yield "unet", RuntimeUNet(runtime, folder, factor)


def load(pipeline_class: Any, source: Path, runtime: Runtime, options: dict[str, Any]) -> Any:
    """The pipeline of a folder, with the networks that a runtime runs; their graphs are made if they are not there.

    Args:
        options: further ones of ``from_pretrained``.

    Raises:
        ValueError: a network is given that is not the folder's.
    """
    index = check_pipeline_folder(source, options)
    for name in NETWORKS:
        if options.get(name) is not None:
            raise ValueError(f"from_pretrained: runtime= and {name}= do not go together; save the pipeline first")
    folder = folder_of(source, runtime, options.get("variant") or only_variant(source))
    hold = None if source in folder.parents else held(folder)
    if not ready(folder):
        logger.warning("Making graphs for %s, once, in %s", runtime.kind.title, folder)
        names = {place: name for name, place in packaged_models().items()}
        model = names.get(source, str(source.absolute()))
        prepare(pipeline_class.from_pretrained(source, **options), runtime, folder, model)
        trim(shared_folder())
    autoencoder = "vqvae" if "vqvae" in index else "vae"
    networks = dict(networks_of(folder, runtime, autoencoder))
    if hold is not None:
        _HOLDS.update(dict.fromkeys(networks.values(), hold))
    return pipeline_class.from_pretrained(source, **networks, **options)


def held(folder: Path) -> Hold | None:
    """A claim to graphs in the cache, which are or will be there; None where it cannot be written to."""
    try:
        with exclusive(folder.parent):
            hold = Hold(folder.parent)
            hold.add([folder.name])
            return hold
    except OSError:
        return None


def export(pipeline_class: Any, folder: Path, runtime: Runtime, variant: str | None = None) -> None:
    """Put graphs into a pipeline's folder, where `load` finds them; those in the cache are copied.

    Raises:
        ValueError: see `prepare`.
    """
    made = folder_of(folder, runtime, variant or only_variant(folder))
    target = folder / GRAPHS / made.name
    if made == target:
        return
    if ready(made):
        with atomic_folder(target) as new:
            shutil.copytree(made, new)
    else:
        logger.warning("Making graphs for %s", runtime.kind.title)
        prepare(pipeline_class.from_pretrained(folder, variant=variant), runtime, target)
