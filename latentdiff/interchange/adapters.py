"""Files of adapters (LoRA, embeddings of new words): found, read, and compared with the networks they are for."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentdiff.interchange.folders import check_safetensors, read_json

LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
EMBEDDING_NAMES = ("learned_embeds.safetensors",)
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for the LoRA's config in a file's header
CONFIG_KEYS = frozenset(
    {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora", "lora_bias"}
)
"""What of a stranger's LoRA config is used: what its weights mean, and nothing that acts on the network."""

PEFT_PREFIX = "base_model.model."
PARAMETER = re.compile(r"\.(lora|lokr)_[^.]*(\.[^.]+)*$")


def find_adapter(source: str | Path, names: Sequence[str], weight_name: str | None = None, **hub: Any) -> Path:
    """The safetensors file of an adapter: a file, one in a folder, or one of a model on the hub (downloaded).

    Args:
        names: what such a file is usually called, best first.
        weight_name: its name in the folder or on the hub; by default one of `names`, or the only safetensors file.
        hub: ``subfolder``, and what ``huggingface_hub.hf_hub_download`` takes: ``revision``, ``token`` and so on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a safetensors file, or it is not clear which one is meant.
        OSError: the hub cannot be asked.
    """
    place = Path(source).expanduser()
    if weight_name is not None and not weight_name.endswith(".safetensors"):
        raise ValueError(f"{weight_name}: only safetensors files are read; others can run code when they are loaded")
    if place.is_file():
        file = place
    elif place.is_dir():
        folder = place / (hub.get("subfolder") or "")
        have = [path.name for path in sorted(folder.glob("*.safetensors"))]
        file = folder / (weight_name or choose(have, names, str(folder)))
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; the folder has {', '.join(have) or 'no safetensors files'}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not place.parent.exists():
        file = download(str(source), names, weight_name, hub)
    else:
        raise FileNotFoundError(f"{source}: no such file or folder")
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: only safetensors files are read; others can run code when they are loaded")
    check_safetensors(file)
    return file


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


def download(repository: str, names: Sequence[str], weight_name: str | None, hub: Mapping[str, Any]) -> Path:
    """The file on the hub, or its copy in the local cache."""
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, weight_name or names[0], **hub))
    except EntryNotFoundError as error:
        if weight_name is not None or isinstance(error, LocalEntryNotFoundError):
            raise
    listed = list_repo_files(repository, revision=hub.get("revision"), token=hub.get("token"))
    have = [name for name in listed if name.endswith(".safetensors") and "/" not in name]
    return Path(hf_hub_download(repository, choose(have, names, repository), **hub))


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A LoRA's tensors and its config if the file, or PEFT's ``adapter_config.json`` beside it, has one.

    The config's keys carry the prefix of the network, as in diffusers (``unet.r``); PEFT's own have none.

    Raises:
        ValueError: the config cannot be read.
    """
    with safe_open(file, "pt") as stream:
        state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (safe_open is no mapping)
        header = (stream.metadata() or {}).get(METADATA_KEY)
    config: Any = None
    if header is not None:
        try:
            config = json.loads(header)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: its {METADATA_KEY} is not JSON ({error})") from None
    elif all(key.startswith(PEFT_PREFIX) for key in state):
        beside = file.with_name("adapter_config.json")
        config = read_json(beside) if beside.is_file() else None
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"{file}: its {METADATA_KEY} is not a JSON object")
    if config is not None:
        config = {key: value for key, value in config.items() if key.rpartition(".")[2] in CONFIG_KEYS}
    return state, config or None


def from_peft(
    state: Mapping[str, Tensor], config: dict[str, Any] | None, networks: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """PEFT's own format, which does not say of which network it is, as diffusers' format; others as they are."""
    if not all(key.startswith(PEFT_PREFIX) for key in state):
        return dict(state), config
    bare = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in state.items()}
    known = {name: {module for module, _ in network.named_modules()} for name, network in networks.items()}
    name = max(known, key=lambda name: sum(module_of(key) in known[name] for key in bare))
    own = None if config is None else {f"{name}.{key}": value for key, value in config.items()}
    return {f"{name}.{key}": tensor for key, tensor in bare.items()}, own


def module_of(key: str) -> str:
    """The module that a LoRA tensor belongs to: its name without ``.lora_A.weight`` and the like."""
    return PARAMETER.sub("", key)


def compare(state: Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Which keys of a LoRA in PEFT's naming, prefixed by network, have a module: (matched, unmatched).

    Raises:
        ValueError: none matches, or a tensor's shape does not fit its module.
    """
    known = {name: dict(network.named_modules()) for name, network in networks.items()}
    matched: list[str] = []
    unmatched: list[str] = []
    for key, tensor in state.items():
        name, _, rest = key.partition(".")
        module = known.get(name, {}).get(module_of(rest))
        (unmatched if module is None else matched).append(key)
        if module is not None:
            check_shape(key, tensor, module)
    if not matched:
        example = f", such as {unmatched[0]}," if unmatched else ""
        raise ValueError(
            f"none of the {len(unmatched)} keys of this LoRA{example} is of this pipeline's {' or '.join(networks)}; "
            f"it is for another kind of model"
        )
    return matched, unmatched


def check_shape(key: str, tensor: Tensor, module: nn.Module) -> None:
    """Raises ValueError if a LoRA matrix does not fit the input or output width of its module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{key}: a {type(module).__name__} has no weight that a LoRA could change")
    side = 1 if ".lora_A." in key else 0 if ".lora_B.weight" in key else None
    if side is not None and tensor.shape[side] != weight.shape[side]:
        raise ValueError(
            f"{key} is made for a width of {tensor.shape[side]} and this model's is {weight.shape[side]}; "
            f"the LoRA is for another model"
        )
