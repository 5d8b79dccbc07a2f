"""Where graphs are, or will be: in a cache by the content of what they are made of, or in the model's folder."""

import hashlib
from pathlib import Path

from latentdiff.interchange.cache_folder import shared_folder
from latentdiff.interchange.fingerprint import component_files, file_digest
from latentdiff.interchange.shared_cache import GRAPHS, GRAPHS_SAY, Hold, exclusive
from latentdiff.pipelines.runtime.choice import Runtime

FORMAT = 3
"""Of what is written; raised when the graphs of an older version must not be used any more."""

NETWORKS = ("unet", "transformer", "vae", "vqvae")
"""The components that a runtime may run."""

PARTS = (*NETWORKS, "text_encoder", "tokenizer")
"""What graphs are made of."""

DONE = GRAPHS_SAY
"""In a folder of graphs: what they were made for and, of int8, how far it is from float32."""


TOKENS_SAY = "tokens.json"
"""Beside the text encoder's graph: its tokenizer, and what the encoder takes."""


def cache_folder() -> Path:
    """Where graphs are kept."""
    return shared_folder() / GRAPHS


def folder_of(source: Path, runtime: Runtime, variant: str | None = None) -> Path:
    """Where the graphs of a pipeline folder are: in it, if `export` has put them there; or are kept, or will be."""
    parts = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name != GRAPHS)
    kept = parts if runtime.stored == "int8" else [name for name in parts if name in PARTS]
    whole = hashlib.sha256(f"{FORMAT} {runtime.name} {runtime.stored}\n".encode())
    for name in kept:
        for file in component_files(source / name, variant):
            whole.update(f"{name}/{file.name} {file_digest(file)}\n".encode())
    name = f"{runtime.name}-{runtime.stored}-{whole.hexdigest()[:32]}"
    return source / GRAPHS / name if ready(source / GRAPHS / name) else cache_folder() / name


def ready(folder: Path) -> bool:
    """Whether there are graphs in a folder."""
    return (folder / DONE).is_file()


def held(folder: Path) -> Hold | None:
    """A claim to graphs in the cache, which are or will be there; None where it cannot be written to."""
    try:
        with exclusive(folder.parent):
            hold = Hold(folder.parent)
            hold.add([folder.name])
            return hold
    except OSError:
        return None
