"""Files of adapters (LoRA, embeddings of new words): finding, checking and writing them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.folders import check_links, check_safetensors, read_json
from latentdiff.interchange.hub import asking_hub

LYCORIS_NAME = "lycoris_weights.safetensors"
LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", LYCORIS_NAME)
EMBEDDING_NAMES = ("learned_embeds.safetensors",)
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for the LoRA's config in a file's header
CONFIG_KEYS = frozenset(
    {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora", "lora_bias"}
)
"""The keys of a foreign LoRA config that are used: those that define its weights, and none that acts on the network."""

PEFT_TYPES = ("LORA", "LOHA", "LOKR")


SAFE = (".safetensors",)
PICKLED = (*SAFE, ".bin", ".pt")
NOT_READ = "only safetensors files are read; others can run code when they are loaded"


def find_adapter(
    source: str | Path,
    names: Sequence[str],
    weight_name: str | None = None,
    suffixes: tuple[str, ...] = SAFE,
    **hub: Any,
) -> Path:
    """The file of an adapter: a file, one in a folder, or one of a model on the hub (downloaded).

    Args:
        names: the usual names of such a file, best first.
        suffixes: of the files that may be read: `SAFE`, or `PICKLED` if the user allowed it.
        weight_name: its name in the folder or on the hub; by default one of `names`, or the only safetensors file.
        hub: ``subfolder``, and what ``huggingface_hub.hf_hub_download`` takes: ``revision``, ``token`` and so on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no safetensors file or ambiguous, or `weight_name`, ``subfolder`` or a link leads out
            of the folder.
        OSError: the hub cannot be reached.
    """
    place = Path(source).expanduser()
    for name, value in (("weight_name", weight_name), ("subfolder", hub.get("subfolder"))):
        check_inside(name, value)
    if weight_name is not None and not weight_name.endswith(suffixes):
        raise ValueError(f"{weight_name}: {NOT_READ}")
    if place.is_file():
        file = place
    elif place.is_dir():
        folder = place / (hub.get("subfolder") or "")
        have = sorted(path.name for path in folder.glob("*") if path.name.endswith(suffixes))
        file = folder / (weight_name or choose(have, names, str(folder)))
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; the folder has {', '.join(have) or 'no safetensors files'}")
        check_links(place, [file, folder / "adapter_config.json"])
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not place.parent.exists():
        file = download(str(source), names, weight_name, suffixes, hub)
    else:
        raise FileNotFoundError(f"{source}: no such file or folder")
    if file.suffix not in suffixes:
        raise ValueError(f"{file}: {NOT_READ}")
    if file.suffix in SAFE:
        check_safetensors(file)
    return file


def name_of(source: Any) -> str:
    """What messages call the source of an adapter: its file, or that there is none."""
    names = [str(one) for one in (source if isinstance(source, list) else [source]) if isinstance(one, str | Path)]
    return ", ".join(names) or "these tensors"


def check_inside(name: str, value: str | None) -> None:
    """Raises ValueError if the relative path `value` leads out of the folder it is relative to."""
    if value and (PurePath(value).is_absolute() or ".." in re.split(r"[/\\]", value)):
        raise ValueError(f"{name}={value!r} leads out of the folder; give the folder that the file is in")


def choose(have: Sequence[str], names: Sequence[str], where: str) -> str:
    """One of the file names `have`: the first of `names` among them, or the only one."""
    known = [name for name in names if name in have]
    if known:
        return known[0]
    if not have:
        raise FileNotFoundError(f"{where}: no safetensors file there; expected {' or '.join(names)}")
    if len(have) > 1:
        raise ValueError(f"{where}: several files ({', '.join(have)}); say which with weight_name=...")
    return have[0]


def download(
    repository: str, names: Sequence[str], weight_name: str | None, suffixes: tuple[str, ...], hub: Mapping[str, Any]
) -> Path:
    """The file on the hub, or its copy in the local cache."""
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with asking_hub(repository):
            return Path(hf_hub_download(repository, weight_name or names[0], **hub))
    except EntryNotFoundError as error:
        if weight_name is not None or isinstance(error, LocalEntryNotFoundError):
            raise
    listed = list_repo_files(repository, revision=hub.get("revision"), token=hub.get("token"))
    have = [name for name in listed if name.endswith(suffixes) and "/" not in name]
    return Path(hf_hub_download(repository, choose(have, names, repository), **hub))


def read_config(file: Path, header: Mapping[str, str], *, beside: bool) -> dict[str, Any] | None:
    """A LoRA's config, if its file's header or, for PEFT's format, ``adapter_config.json`` beside it has one.

    The config's keys carry the prefix of the network, as in diffusers (``unet.r``); PEFT's own have none.

    Raises:
        ValueError: it cannot be read, or is of an adapter of another kind.
    """
    config: Any = None
    if METADATA_KEY in header:
        try:
            config = json.loads(header[METADATA_KEY])
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file}: its {METADATA_KEY} is not JSON ({error})") from None
    elif beside and (other := file.with_name("adapter_config.json")).is_file():
        config = read_json(other)
        if config.get("peft_type", "LORA") not in PEFT_TYPES:
            raise ValueError(f"{other} is of {config['peft_type']}, not of a LoRA, LoHa or LoKr")
        if "alpha" in config and "lora_alpha" not in config:
            config["lora_alpha"] = config["alpha"]
    if config is None:
        return None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: its {METADATA_KEY} is not a JSON object")
    return {key: value for key, value in config.items() if key.rpartition(".")[2] in CONFIG_KEYS} or None


def save_whole(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Missing folders are made."""
    with atomic_file(file) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, header)
