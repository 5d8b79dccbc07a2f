"""Finding a model's folder, packaged or not, and checking it with clear errors before a library reads it."""

import json
import math
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from latentdiff.extensions import registered_network
from latentdiff.interchange.user_files import (
    MAX_HEADER,
    check_regular,
    check_regular_files,
    check_timesteps,
    parse_json_object,
    read_text,
)
from latentdiff.terminal import held_back

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "emoji"
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
"""Where the models are that ship inside the package."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "latent_diffusion")
"""Where the classes of a pipeline's components may come from: two libraries, and two folders of pipelines in diffusers,
which itself would import any module that a folder names."""

COMPONENTS = ("unet", "vae", "vqvae", "text_encoder", "tokenizer", "scheduler", "classifier", "transformer")
"""What a folder's index names by library and class, if it names it at all."""

DENOISERS = ("unet", "transformer")
"""What a pipeline's denoiser is called in its folder."""

OUR_MODULES = (
    "latentdiff.models.autoencoder",  # of folders saved before there was `codes`
    "latentdiff.models.classifier",
    "latentdiff.models.codes",
    "latentdiff.models.dalle",
    "latentdiff.models.identity",
    "latentdiff.models.token_transformer",
)
"""Where our classes are defined that diffusers does not have."""


def packaged_models() -> dict[str, Path]:
    """The names of the models in this installation, and their folders."""
    return {index.parent.name: index.parent for index in sorted(WEIGHTS.glob("*/model_index.json"))}


def packaged_model(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a packaged model.

    Raises:
        FileNotFoundError: this installation has no model of that name.
    """
    models = packaged_models()
    if name not in models:
        have = f"it has {', '.join(models)}" if models else "it has none: the package was built without its weights"
        raise FileNotFoundError(f"no model named {name!r} comes with this installation of latentdiff; {have}")
    return models[name]


def check_transformers_source(source: str, others: str) -> None:
    """Raises FileNotFoundError unless this is a folder with a config.json, or what can be a hub id.

    others: what else `source` could be, for the message.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{source} is not a transformers model: it has no config.json")
    elif not HUB_ID.fullmatch(source) or folder.parent.exists():
        raise FileNotFoundError(f"{source}: no such folder; {others}, a transformers model's folder or its owner/name")


def check_clip_source(source: str | None) -> None:
    """Raises FileNotFoundError if there can be no CLIP that `latentdiff.metrics.clip.load_clip` would load."""
    if source is not None and not source.startswith("open_clip:"):
        check_transformers_source(source, "a CLIP is open_clip:NAME/PRETRAINED")


def find_model(source: str | Path | None) -> Path | None:
    """A model's folder, by the name of a packaged model or by its path; None for the id of a model on the hub.

    None stands for the packaged default. A packaged name wins over a folder of the same name; write ``./name`` for the
    folder. What could be both a hub id and a path is a path if its first part exists.

    Raises:
        FileNotFoundError: there is no such folder, and it cannot be a hub id.
    """
    if source is None:
        return packaged_model()
    known = packaged_models()
    if str(source) in known:
        return known[str(source)]
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(
            f"{source} is a file, and a model's folder is needed here: 'latentdiff convert {source} FOLDER' makes one "
            f"of it (from_single_file loads the file itself)"
        )
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not folder.parent.exists():
        return None
    if str(source) == DEFAULT_MODEL:
        return packaged_model()  # raises, and says that the weights are missing
    names = ", ".join(known) or "none in this installation"
    raise FileNotFoundError(
        f"{source}: no such folder; give a folder that holds a model_index.json, the name of a packaged model "
        f"({names}) or an 'owner/name' on the Hugging Face hub"
    )


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError naming `file` if it is not a JSON object, or no regular file."""
    return parse_json_object(read_text(file), f"{file} is damaged")


def check_pipeline_folder(folder: Path, given: Iterable[str] = ()) -> dict[str, Any]:
    """The index of a pipeline folder, after checking all components that it names, except those in `given`.

    Raises:
        FileNotFoundError: it is no pipeline folder, or a component or shard named by its indices is missing.
        ValueError: a file is damaged.
    """
    if not (folder / "model_index.json").is_file():
        if (folder / "config.json").is_file():
            alone = read_json(folder / "config.json").get("_class_name", "network")
            raise FileNotFoundError(
                f"{folder} is not a pipeline folder: it holds one {alone} alone (as 'latentdiff train autoencoder' "
                f"makes), and a whole model is needed, which draws"
            )
        raise FileNotFoundError(
            f"{folder} is not a pipeline folder: it has no model_index.json (what save_pretrained writes, with the "
            f"folders vae, text_encoder, tokenizer, unet and scheduler beside it)"
        )
    check_links(folder, [folder / "model_index.json"])
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name", "")
    if isinstance(kind, list) and kind:
        raise ValueError(f"{folder}: the pipeline needs code of its own, {kind[0]}.py, which is not run")
    if not isinstance(kind, str):
        raise ValueError(f"{folder / 'model_index.json'}: its _class_name is {kind!r}, not the name of a pipeline")
    for name, value in index.items():
        if name.startswith("_") or not is_component(folder, name, value):
            continue
        if registered_network(*value) is None:
            check_origin(folder / "model_index.json", name, value[0])
        if name not in given:
            check_component(folder, name, value[1])
    return index


def is_component(folder: Path, name: str, value: Any) -> bool:
    """Whether an entry of a folder's index is a component that it has.

    Raises:
        ValueError: it should be one, and does not say of which class.
    """
    if isinstance(value, list) and len(value) == 2:
        if value[0] is None or value[1] is None:
            return False
        if all(isinstance(one, str) for one in value):
            return True
    elif name not in COMPONENTS and not (name.isidentifier() and (folder / name).is_dir()):
        return False  # a setting of the pipeline
    raise ValueError(
        f"{folder / 'model_index.json'}: its {name} is {json.dumps(value)[:200]}; a component is named by its library "
        f'and its class, such as ["diffusers", "AutoencoderKL"], or by [null, null] if there is none'
    )


def check_origin(index: Path, name: str, library: Any) -> None:
    """Raises ValueError for a component whose class is of an unknown library, or that lies outside the folder."""
    if not name.isidentifier():
        raise ValueError(f"{index}: {name!r} is no name for a component")
    if library not in (*LIBRARIES, *OUR_MODULES):
        raise ValueError(
            f"{index}: {name} is of {library!r}; only components of diffusers and transformers are loaded, "
            f"others could run any code"
        )


def check_component(folder: Path, name: str, class_name: str) -> None:
    part = folder / name
    if not part.is_dir():
        raise FileNotFoundError(
            f"{folder}: the folder {name} is missing; model_index.json says it holds a {class_name}"
        )
    check_links(folder, (part, *part.glob("*")))
    check_model_files(part)


def check_model_files(part: Path) -> None:
    """Check the files of one network or tokenizer, before a library reads them; those below it are left to that.

    Raises:
        FileNotFoundError: a file is missing that an index of weights names.
        ValueError: a file is damaged, no regular file, or would make the library do what nobody asked for.
    """
    check_regular_files(part)
    check_adapters(part)
    for file in sorted(part.glob("*.json")):
        values = read_json(file)
        check_timesteps(values, file)
        check_numbers(values, file)
        if file.name.endswith(".index.json"):
            check_shards(file, values)
    for file in sorted(part.glob("*.safetensors")):
        check_safetensors(file)


def check_links(root: Path, paths: Iterable[Path]) -> None:
    """Refuse links that lead out of the folder `root`, but for those of the hub's cache to its files.

    root: what the user named; it may be a link itself.

    Raises:
        ValueError: there is one, and where it leads.
    """
    base = Path(os.path.realpath(root))  # resolve() raises RuntimeError for a link to itself
    cache = next(((parent.parent / "blobs").resolve() for parent in base.parents if parent.name == "snapshots"), None)
    for path in paths:
        place = Path(os.path.realpath(path))
        if not place.is_relative_to(base) and not (cache is not None and place.parent == cache):
            raise ValueError(
                f"{path} is a link that leads out of {root}, to {place}; only links within a folder are followed: "
                f"put the file itself there"
            )


def check_adapters(folder: Path) -> None:
    """Raises ValueError for a component with an adapter, which transformers would apply without a word."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json) beside a model; move it out, and load it with "
            f"load_lora_weights() (--lora) if you want it"
        )


def check_numbers(values: Any, file: Path, key: str = "") -> None:
    """Raises ValueError for a NaN anywhere in a config; an infinity is a bound that some schedulers have."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in pairs:
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{file}: its {key}{name} is not a number (NaN)")
        if isinstance(value, dict | list):
            check_numbers(value, file, f"{key}{name}.")


def check_shards(file: Path, index: dict[str, Any]) -> None:
    """Raises ValueError or FileNotFoundError if an index of weights names what is not a file beside it."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{file} is damaged: its weight_map should name a file for each weight")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{file} is damaged: its metadata should be a JSON object")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{file} names the shard {shard!r}, which is not a file beside it")
        if not (file.parent / shard).is_file():
            raise FileNotFoundError(f"{file.parent / shard} is missing; {file.name} names it")


def check_safetensors(file: Path) -> None:
    """Check by header and size that a safetensors file is whole; no weights are read.

    Raises:
        ValueError: it is damaged, and how.
    """
    check_regular(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError(f"{file} is a Git LFS pointer, not the weights themselves; fetch them with 'git lfs pull'")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is damaged: {size} bytes are too few, or it is not a safetensors file")
        if length > MAX_HEADER:
            raise ValueError(f"{file} is damaged: its header has {length} bytes, more than the format allows")
        header = parse_json_object(stream.read(length), f"{file} is damaged: its header cannot be read")
    ends = [0]
    for name, entry in header.items():
        if name == "__metadata__":
            is_good = isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())
        else:
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            is_good = isinstance(offsets, list) and len(offsets) == 2 and all(type(end) is int for end in offsets)
            ends += offsets if is_good and offsets else []
        if not is_good:
            raise ValueError(f"{file} is damaged: its header cannot be read, at {name[:200]!r}")
    if size != 8 + length + max(ends):
        expected = 8 + length + max(ends)
        raise ValueError(f"{file} is damaged: it has {size} bytes and should have {expected}; copy it again")
    try:
        with safe_open(file, "np"):  # everything else, such as shapes that do not fit
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def first_dtype(file: Path) -> "torch.dtype | None":
    """The precision of the first weight of floating point in a safetensors file; None if it has none."""
    check_safetensors(file)
    with safe_open(file, "pt") as stream:
        floating = (stream.get_tensor(name) for name in stream.keys())  # noqa: SIM118 (safe_open is no mapping)
        return next((tensor.dtype for tensor in floating if tensor.is_floating_point()), None)


def load_whole(model_class: Any, place: str | Path, **options: Any) -> Any:
    """A model of transformers, by its class's ``from_pretrained``, with all of its weights from the files.

    transformers itself gives weights that are missing random values. Only poolers may be missing, which no pipeline
    reads.

    Raises:
        ValueError: weights are missing, of another shape or not finite; or there is an adapter in the folder.
    """
    from latentdiff.models.network import TracerSpared, check_finite

    folder = Path(place, options.get("subfolder") or "")
    check_adapters(folder)
    with held_back("transformers.modeling_utils"), TracerSpared():  # a table of what it fills with random values
        try:
            model, info = model_class.from_pretrained(place, use_safetensors=True, output_loading_info=True, **options)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights do not fit config.json: {str(error).splitlines()[0]}") from error
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise ValueError(
                f"{folder}: the weights do not fit config.json; {len(missing)} are missing, such as {missing[0]}; copy "
                f"the folder again"
            )
    check_finite(model, folder)
    return model
