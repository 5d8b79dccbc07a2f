"""Graphs made once, and kept where `places` says."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from latentdiff.interchange.atomic import atomic_folder, json_text
from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.folders import check_pipeline_folder, packaged_models
from latentdiff.interchange.shared_cache import GRAPHS, Hold, trim
from latentdiff.models.loras import refuse_loras
from latentdiff.pipelines.runtime.choice import Runtime
from latentdiff.pipelines.runtime.engine_networks import RuntimeAutoencoder, RuntimeUNet
from latentdiff.pipelines.runtime.places import DONE, NETWORKS, folder_of, held, ready
from latentdiff.pipelines.storage.loading import only_variant

logger = logging.getLogger(__name__)

_HOLDS: WeakKeyDictionary[Any, Hold] = WeakKeyDictionary()
"""By the networks that read them, the claims to graphs in the cache, which is not cleared of them meanwhile."""


def prepare(pipeline: Any, runtime: Runtime, folder: Path, model: str | None = None) -> None:
    """Write the graphs of a pipeline in torch for a runtime, the folder whole or not at all.

    Args:
        model: whose they are; written down with them.

    Raises:
        ValueError: it has LoRAs, or an operation that the runtime does not know.
    """
    from latentdiff.pipelines.runtime.graphs import parts_of, write_graph
    from latentdiff.pipelines.runtime.quantize import quantize, without_pictures
    from latentdiff.pipelines.runtime.text_graph import write_text

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
            write_text(pipeline, runtime.name, new)
            if runtime.stored == "int8":
                report |= quantize(pipeline, runtime, new)
            (new / DONE).write_text(json_text(report), encoding="utf-8")
    except OSError:
        if not ready(folder):  # another process was first
            raise


def networks_of(folder: Path, runtime: Runtime, index: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The networks whose graphs lie in a folder, by the names of a pipeline's components.

    index: of the pipeline's folder.
    """
    factor = 1
    if (folder / "vae_decoder").is_dir():
        vae = RuntimeAutoencoder(runtime, folder)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        yield "vqvae" if "vqvae" in index else "vae", vae
    yield "transformer" if "transformer" in index else "unet", RuntimeUNet(runtime, folder, factor)


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
    networks = dict(networks_of(folder, runtime, index))
    if hold is not None:
        _HOLDS.update(dict.fromkeys(networks.values(), hold))
    return pipeline_class.from_pretrained(source, **networks, **options)


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
