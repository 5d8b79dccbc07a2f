"""LoRA and textual inversion for our pipelines: diffusers' mix-ins, with checks before anything is changed."""

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.interchange.adapters import (
    EMBEDDING_NAMES,
    LORA_NAMES,
    METADATA_KEY,
    compare,
    find_adapter,
    from_peft,
    module_of,
    read_lora,
)

logger = logging.getLogger(__name__)


class LoadedLora(NamedTuple):
    """What `load_lora_weights` did: the adapter's name, and the keys that have a place in the networks, or none."""

    adapter_name: str
    matched: list[str]
    unmatched: list[str]


class AdapterPipeline(StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
    """``set_adapters``, ``fuse_lora``, ``unfuse_lora``, ``unload_lora_weights`` and the rest are diffusers' own."""

    unet: Any
    text_encoder: Any
    tokenizer: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        scale: float = 1.0,
        low_cpu_mem_usage: bool = True,
        **hub: Any,
    ) -> LoadedLora:
        """Load a LoRA of the UNet, of the text encoder, or of both; it then is the active one.

        Several can be loaded, one after the other; ``set_adapters(["a", "b"], [0.7, 0.3])`` makes them act together.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder, an ``owner/name`` on the hub, or the
                tensors themselves; in diffusers', PEFT's or kohya's format.
            adapter_name: to speak of it later; by default ``default_0`` and so on.
            hotswap: put it in the place of the adapter of this name (UNet only; see diffusers).
            weight_name: of the file in the folder or on the hub.
            scale: how strongly it acts.
            low_cpu_mem_usage: do not make random weights first.
            hub: ``subfolder``, and for the hub ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and so on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file, or is damaged; no key of it has a place here; a shape does not
                fit; the name is taken. Nothing is changed then.
        """
        networks = {name: network for name in self._lora_loadable_modules if (network := getattr(self, name, None))}
        hub = {key: value for key, value in hub.items() if key not in ("use_safetensors", "return_lora_metadata")}
        state, alphas, config = self._read(pretrained_model_name_or_path_or_dict, networks, weight_name, hub)
        named = in_peft_names(state, networks)
        matched, unmatched = compare(named, networks)
        adapter_name = adapter_name or free_name(networks)
        if not hotswap and adapter_name in names_in_use(networks):
            raise ValueError(f"there is an adapter {adapter_name!r} already; choose another adapter_name")
        options = {
            "adapter_name": adapter_name,
            "_pipeline": self,
            "hotswap": hotswap,
            "low_cpu_mem_usage": low_cpu_mem_usage,
        }
        parts = {key.split(".")[0] for key in matched}
        if "unet" in parts:
            self.load_lora_into_unet(state, alphas, self.unet, metadata=part_of(config, "unet"), **options)
        own = part_of(config, "text_encoder")
        if "text_encoder" in parts and is_clips(named):
            self.load_lora_into_text_encoder(state, alphas, self.text_encoder, metadata=own, **options)
        elif "text_encoder" in parts:
            bare = {key: named[key] for key in matched}
            load_into_encoder(
                self.text_encoder,
                without_prefix(bare, "text_encoder"),
                without_prefix(own, "text_encoder"),
                adapter_name,
            )
        if scale != 1.0:
            self.set_adapters(adapter_name, scale)
        logger.info("LoRA %s: %d of %d keys matched", adapter_name, len(matched), len(matched) + len(unmatched))
        if unmatched:
            logger.warning(
                "LoRA %s: %d of its keys are not of this model and are left out, such as %s",
                *(adapter_name, len(unmatched), unmatched[0]),
            )
        return LoadedLora(adapter_name, matched, unmatched)

    def _read(
        self, source: str | Path | dict[str, Tensor], networks: Mapping[str, nn.Module], name: str | None, hub: Any
    ) -> tuple[dict[str, Tensor], dict[str, float] | None, dict[str, Any] | None]:
        """Tensors in diffusers' format, kohya's alphas, and the config."""
        config: dict[str, Any] | None = None
        if isinstance(source, dict):
            state = dict(source)
        else:
            state, config = read_lora(find_adapter(source, LORA_NAMES, name, **hub))
        if not state:
            raise ValueError(f"{source}: there are no tensors in it")
        state, config = from_peft(state, config, networks)
        state, alphas = self.lora_state_dict(state)
        return state, alphas or None, config

    @staticmethod
    def write_lora_layers(
        state_dict: dict[str, Tensor],
        save_directory: str | Path,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """What ``save_lora_weights`` ends in: one safetensors file, whole or not at all.

        Raises:
            ValueError: another way of saving is asked for.
        """
        if not safe_serialization or save_function is not None:
            raise ValueError("save_lora_weights: a LoRA is saved in a safetensors file, and by no save_function")
        if not is_main_process:
            return
        header = {"format": "pt"}
        if lora_adapter_metadata:
            header[METADATA_KEY] = json.dumps(lora_adapter_metadata, default=sorted, indent=2, sort_keys=True)
        save_whole(state_dict, Path(save_directory) / (weight_name or LORA_NAMES[0]), header)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        **hub: Any,
    ) -> None:
        """Teach the pipeline new words from embeddings, such as `latentdiff finetune` makes.

        Args:
            pretrained_model_name_or_path: a safetensors file, a folder, an ``owner/name`` on the hub, a tensor or
                tensors {word: (n, D) or (D,)}; or a list of these.
            token: the word, or one for each; by default what the file says.
            tokenizer, text_encoder: by default the pipeline's.
            weight_name: of the file in the folder or on the hub.
            hub: as for `load_lora_weights`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file, is damaged or of another width; the word is known already.
        """
        tokenizer, text_encoder = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        several = isinstance(pretrained_model_name_or_path, list)
        sources = pretrained_model_name_or_path if several else [pretrained_model_name_or_path]
        hub = {key: value for key, value in hub.items() if key != "use_safetensors"}
        width = text_encoder.get_input_embeddings().weight.shape[1]
        embeddings = [read_embedding(source, token, width, weight_name, hub) for source in sources]
        super().load_textual_inversion(embeddings if several else embeddings[0], token, tokenizer, text_encoder)

    def unload_textual_inversion(self, tokens: Any = None, tokenizer: Any = None, text_encoder: Any = None) -> None:
        """Forget words that were loaded; all by default.

        Raises:
            ValueError: some of several, with a tokenizer in which diffusers would then number the rest wrongly.
        """
        tokenizer = tokenizer or self.tokenizer
        decoder = tokenizer.added_tokens_decoder
        ordinary = [token.content for token in decoder.values() if not token.special]
        special = [number for number, token in decoder.items() if token.special]
        first = len(tokenizer) - len(ordinary)
        wanted = {tokens} if isinstance(tokens, str) else set(tokens or ordinary)
        if wanted & set(ordinary) and not wanted >= set(ordinary) and max(special, default=-1) + 1 != first:
            raise ValueError(f"a {type(tokenizer).__name__} can only forget all new words at once: {ordinary}")
        super().unload_textual_inversion(tokens, tokenizer, text_encoder or self.text_encoder)


@contextmanager
def lora_scaled(networks: Iterable[nn.Module], scale: float) -> Iterator[None]:
    """Within, the LoRAs of `networks` act `scale` times as strongly as they were set to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for network in networks for module in network.modules() if isinstance(module, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: scale * strength for name, strength in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, strengths in zip(layers, before, strict=True):
            layer.scaling.update(strengths)


def in_peft_names(state: Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a LoRA in diffusers' format under PEFT's names; only to look at."""
    names: dict[str, Tensor] = {}
    for prefix in dict.fromkeys(key.split(".")[0] for key in state):
        part = without_prefix(state, prefix)
        in_pefts = any(".lora_A" in key or ".lokr_" in key for key in part)
        if prefix == "unet" and not in_pefts:
            part = convert_unet_state_dict_to_peft(part)
        elif prefix == "text_encoder" and not in_pefts:
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
        if prefix == "text_encoder" and not hasattr(networks.get(prefix), "text_model"):  # as diffusers
            part = {key.removeprefix("text_model."): value for key, value in part.items()}
        names |= {f"{prefix}.{key}": value for key, value in part.items()}
    return names


def without_prefix(values: Mapping[str, Any] | None, prefix: str) -> dict[str, Any]:
    """What in `values` is of the network `prefix`, without the prefix."""
    start = f"{prefix}."
    return {key.removeprefix(start): value for key, value in (values or {}).items() if key.startswith(start)}


def part_of(config: dict[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    """`config` if it says something of the network `prefix`."""
    return config if config and any(key.startswith(f"{prefix}.") for key in config) else None


def load_into_encoder(
    text_encoder: Any, state: Mapping[str, Tensor], config: Mapping[str, Any] | None, adapter_name: str
) -> None:
    """A LoRA into a text encoder other than CLIP's, whose names diffusers' loader does not know.

    state: in PEFT's names, without prefix; config: likewise, or None, for scales of 1.
    """
    from peft import LoraConfig

    ranks = {module_of(key): tensor.shape[1] for key, tensor in state.items() if "lora_B" in key}
    first = next(iter(ranks.values()))
    scale_one = {"r": first, "lora_alpha": first, "rank_pattern": ranks, "alpha_pattern": ranks}
    settings = {**(config or scale_one), "target_modules": sorted(ranks)}
    text_encoder.load_adapter(
        adapter_name=adapter_name, adapter_state_dict=dict(state), peft_config=LoraConfig(**settings)
    )
    text_encoder.to(text_encoder.device, text_encoder.dtype)


def is_clips(state: Mapping[str, Tensor]) -> bool:
    """Whether a LoRA in PEFT's names is of CLIP's text encoder."""
    kinds = {module_of(key).rpartition(".")[2] for key in state if key.startswith("text_encoder.")}
    return bool(kinds & {"q_proj", "k_proj", "v_proj", "out_proj"})


def names_in_use(networks: Mapping[str, nn.Module]) -> set[str]:
    return {name for network in networks.values() for name in getattr(network, "peft_config", {})}


def free_name(networks: Mapping[str, nn.Module]) -> str:
    """``default_0`` or the next that no network has; diffusers counts for each network, and can give two names."""
    taken = names_in_use(networks)
    return next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)


def read_embedding(source: Any, token: Any, width: int, weight_name: str | None, hub: Any) -> Any:
    """A tensor, or {word: tensor}, of a source of `load_textual_inversion`, looked over."""
    if not isinstance(source, torch.Tensor | dict):
        source = load_file(find_adapter(source, EMBEDDING_NAMES, weight_name, **hub))
    tensors = {"": source} if isinstance(source, torch.Tensor) else dict(source)
    if "emb_params" in tensors and token is None:
        raise ValueError("this file does not say which word it is for; give one with token='<word>'")
    for word, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and (tensor.ndim not in (1, 2) or tensor.shape[-1] != width):
            raise ValueError(
                f"the embedding {word!r} has the shape {tuple(tensor.shape)}; this text encoder's are {width} wide, "
                f"so it is for another model"
            )
    return source


def save_whole(tensors: Mapping[str, Tensor], file: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; its folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".saving-") as folder:
        partial = Path(folder) / file.name
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, header)
        os.replace(partial, file)
