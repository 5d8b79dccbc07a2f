"""LoRAs in pipelines: diffusers' mix-in, with checks before anything is changed."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import recurse_remove_peft_layers
from torch import Tensor, nn

from latentdiff.interchange.adapter_files import LORA_NAMES, METADATA_KEY, name_of, save_whole
from latentdiff.interchange.folders import DENOISERS
from latentdiff.interchange.lora.formats import LoraFile, with_network
from latentdiff.interchange.lora.kohya_names import TRANSFORMER, UNET, flat_names, short
from latentdiff.interchange.lora.layers import (
    Layers,
    LoraLayer,
    format_of,
    of_network,
    peft_config,
    peft_tensors,
    read_layers,
)
from latentdiff.interchange.user_files import faults_named
from latentdiff.models.loras import whole_network
from latentdiff.pipelines.runtime.engine_networks import refuse_runtimes

logger = logging.getLogger(__name__)


class LoadedLora(NamedTuple):
    """What `load_lora_weights` did: the adapter's name, and the keys that have a place in the networks, or none."""

    adapter_name: str
    matched: list[str]
    unmatched: list[str]


def of_diffusers(name: str) -> Any:
    """diffusers' method `name`, for compiled networks too, and with factors that are finite.

    diffusers looks at the networks' classes, and would pass over those that ``torch.compile`` returned.
    """

    @wraps(getattr(StableDiffusionLoraLoaderMixin, name))
    def call(self: Any, *args: Any, **options: Any) -> Any:
        check_factors(name, [*args, *options.values()])
        parts = {part: getattr(self, part, None) for part in self._lora_loadable_modules}
        compiled = {part: network for part, network in parts.items() if whole_network(network) is not network}
        vars(self).update({part: whole_network(network) for part, network in compiled.items()})
        if name in ("fuse_lora", "unfuse_lora") and not args:  # of all networks, whose number diffusers' classes know
            options.setdefault("components", list(self._lora_loadable_modules))
        try:
            return getattr(super(LoraPipeline, self), name)(*args, **options)
        finally:
            vars(self).update(compiled)

    return call


class LoraPipeline(StableDiffusionLoraLoaderMixin):
    """``set_adapters``, ``fuse_lora``, ``unload_lora_weights`` and the rest are diffusers' own, see `of_diffusers`."""

    unet: Any
    text_encoder: Any

    set_adapters = of_diffusers("set_adapters")
    get_active_adapters = of_diffusers("get_active_adapters")
    get_list_adapters = of_diffusers("get_list_adapters")
    enable_lora = of_diffusers("enable_lora")
    disable_lora = of_diffusers("disable_lora")
    fuse_lora = of_diffusers("fuse_lora")
    unfuse_lora = of_diffusers("unfuse_lora")
    unload_lora_weights = of_diffusers("unload_lora_weights")

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """As in diffusers; a network that has no LoRA any more is again what it was without, and can be saved."""
        of_diffusers("delete_adapters")(self, adapter_names)
        for part in self._lora_loadable_modules:
            network = whole_network(getattr(self, part, None))
            if network is not None and not getattr(network, "peft_config", None):
                recurse_remove_peft_layers(network)
                vars(network).pop("peft_config", None)
                network._hf_peft_config_loaded = None

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
        """Load a LoRA of the denoiser, of the text encoder, or of both; it then is the active one.

        Several can be loaded, one after the other; ``set_adapters(["a", "b"], [0.7, 0.3])`` makes them act together.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder, an ``owner/name`` on the hub, or the
                tensors themselves; in diffusers', PEFT's or kohya's format.
            adapter_name: its name in later calls; by default ``default_0`` and so on.
            hotswap: put it in the place of the adapter of this name, as long as that need not be compiled anew
                (denoiser only, all layers of one alpha / rank; see diffusers).
            weight_name: of the file in the folder or on the hub.
            scale: how strongly it acts.
            low_cpu_mem_usage: do not make random weights first.
            hub: ``subfolder``, and for the hub ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and so on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a safetensors file, or is damaged; no key of it has a place here; a shape does not
                fit; the name is taken; `scale` is not finite. Nothing is changed then.
        """
        check_factors("load_lora_weights", [scale])
        refuse_runtimes(self.components, "given LoRAs, but for those in its weights (fuse_lora, unload_lora_weights)")
        parts = {name: getattr(self, name, None) for name in self._lora_loadable_modules}
        networks = {name: whole_network(network) for name, network in parts.items() if network is not None}
        hub = {key: value for key, value in hub.items() if key not in ("use_safetensors", "return_lora_metadata")}
        with faults_named(name_of(pretrained_model_name_or_path_or_dict)):
            layers, matched, unmatched = fit_lora(pretrained_model_name_or_path_or_dict, networks, weight_name, hub)
        adapter_name = adapter_name or free_name(networks)
        if not hotswap and adapter_name in names_in_use(networks):
            raise ValueError(f"there is an adapter {adapter_name!r} already; choose another adapter_name")
        if hotswap:
            check_swappable(layers)
        with all_or_none(networks, adapter_name):
            self._add_lora(layers, adapter_name, hotswap=hotswap, low_cpu_mem_usage=low_cpu_mem_usage)
            if scale != 1.0:
                self.set_adapters(adapter_name, scale)
        total = len(matched) + len(unmatched)
        logger.info("LoRA %s: %d of %d keys matched", adapter_name, len(matched), total)
        if unmatched:
            message = "LoRA %s: %d of its keys are not of this model and are left out, such as %s"
            logger.warning(message, adapter_name, len(unmatched), unmatched[0])
        return LoadedLora(adapter_name, matched, unmatched)

    def _add_lora(self, layers: Layers, adapter_name: str, **options: Any) -> None:
        """Into the networks that it has layers of."""
        for name in self._lora_loadable_modules:
            if not (own := of_network(layers, name)):
                continue
            network = whole_network(getattr(self, name))
            if name in DENOISERS:
                tensors, config = peft_tensors(own), peft_config(own)
                options |= {"metadata": {f"{name}.{key}": value for key, value in config.items()}, "_pipeline": self}
                tensors = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
                network.load_lora_adapter(tensors, prefix=name, adapter_name=adapter_name, **options)
            else:
                with offloading_paused(self):
                    add_to_encoder(network, own, adapter_name)

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


def check_factors(method: str, values: Iterable[Any]) -> None:
    """Raises ValueError for a factor that is not finite, also in lists and dictionaries of them."""
    for value in values:
        if isinstance(value, Mapping):
            check_factors(method, value.values())
        elif isinstance(value, list | tuple):
            check_factors(method, value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{method}: a LoRA cannot act {value} times as strongly; give a finite number")


def fit_lora(
    source: str | Path | dict[str, Tensor],
    networks: Mapping[str, nn.Module],
    weight_name: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> tuple[Layers, list[str], list[str]]:
    """Read a LoRA and find its layers in `networks`, such as {"unet": ..., "text_encoder": ...}.

    Returns:
        The layers, under the names that they have in the networks; the keys that belong to them, and the others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no LoRA, none of its keys has a place, or a matrix does not fit its layer.
    """
    config = None
    if isinstance(source, dict):
        state = with_network(source, format_of(source))
    else:
        file = LoraFile(source, weight_name, **(hub or {}))
        state, config = file.state, file.config
    places = {f"{name}.{place}": layer for name, network in networks.items() for place, layer in layers_of(network)}
    names = {short(name): name for name in places}
    unet_config = getattr(networks.get("unet"), "config", None)
    depth = getattr(unet_config, "layers_per_block", 2)
    found, unmatched = read_layers(
        state, config, layers_per_block=depth if isinstance(depth, int) else depth[0], known=flat_names(list(places))
    )
    if not found:
        raise ValueError(
            f"none of the {len(unmatched)} keys of this LoRA, such as {unmatched[0]}, is of this pipeline's "
            f"{' or '.join(networks)}; it is for another kind of model"
        )
    found = {name: in_shape(layer, places[names[name]]) for name, layer in found.items()}
    for name, layer in found.items():
        check_fit(name, layer, places[names[name]])
    layers, others = {names[name]: layer for name, layer in found.items()}, set(unmatched)
    for network in networks:
        if own := of_network(layers, network):
            peft_config(own)  # raises if PEFT cannot have it
    return layers, [key for key in state if key not in others], unmatched


def layers_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers and convolutions of a network, in which there may be LoRAs already."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
            module = module.get_base_layer()
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module


def in_shape(layer: LoraLayer, module: nn.Module) -> LoraLayer:
    """With the kernel of the convolution that it is for, where the file leaves that out."""
    weight: Any = module.weight
    if not layer.is_flat or weight.ndim != 4 or weight[0].numel() != layer.down.shape[1]:
        return layer
    return replace(layer, down=layer.down.reshape(-1, *weight.shape[1:]), up=layer.up[..., None, None])


def check_fit(name: str, layer: LoraLayer, module: nn.Module) -> None:
    """Raises ValueError if a LoRA's matrices do not fit the weight of the network's layer."""
    weight: Any = module.weight
    down, up = layer.down, layer.up
    made_for, has = (up.shape[0], *down.shape[1:]), tuple(weight.shape)
    if made_for != has:
        raise ValueError(
            f"{name}: the LoRA is made for a weight of shape {made_for} and this model's is {has}; it is for another "
            f"model"
        )


def check_swappable(layers: Layers) -> None:
    """Raises ValueError if PEFT's hotswap, which knows one strength for all layers, would load a LoRA wrongly."""
    if not all(name.startswith((f"{UNET}.", f"{TRANSFORMER}.")) for name in layers):
        raise ValueError("hotswap: a LoRA with layers of the text encoder cannot be swapped in; load it as an adapter")
    if len({round(layer.scale, 6) for layer in layers.values()}) > 1:
        raise ValueError(
            "hotswap: the layers of this LoRA have different strengths (alpha / rank), which PEFT cannot swap in; load "
            "it as an adapter of its own"
        )


def add_to_encoder(text_encoder: Any, layers: Layers, name: str) -> None:
    """A LoRA into a text encoder of transformers, by PEFT itself.

    transformers' own ``load_adapter`` leaves out DoRA's magnitudes, and diffusers' loader knows the names of CLIP only.

    Raises:
        ValueError: PEFT has no place for some of the LoRA's tensors.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    tensors = peft_tensors(layers)
    inject_adapter_in_model(LoraConfig(**peft_config(layers), inference_mode=True), text_encoder, name)
    text_encoder._hf_peft_config_loaded = True  # read by transformers' methods for adapters
    result = set_peft_model_state_dict(text_encoder, tensors, name)
    if result.unexpected_keys:
        raise ValueError(f"PEFT has no place for {result.unexpected_keys[0]} of this LoRA")
    text_encoder.eval().to(text_encoder.device, text_encoder.dtype)


@contextmanager
def offloading_paused(pipeline: Any) -> Iterator[None]:
    """Within, the hooks of diffusers' offloading are removed from the pipeline's networks."""
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

    whole, sequential, in_groups = pipeline._optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if whole:
            pipeline.enable_model_cpu_offload()
        elif sequential:
            pipeline.enable_sequential_cpu_offload()
        elif in_groups:
            for part in pipeline.components.values():
                if isinstance(part, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(part)


def names_in_use(networks: Mapping[str, nn.Module]) -> set[str]:
    return {name for network in networks.values() for name in getattr(network, "peft_config", {})}


def free_name(networks: Mapping[str, nn.Module]) -> str:
    """``default_0`` or the next that no network has; diffusers counts for each network, and can give two names."""
    taken = names_in_use(networks)
    return next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)


@contextmanager
def all_or_none(networks: Mapping[str, nn.Module], name: str) -> Iterator[None]:
    """If what is done within fails, the adapter `name` is taken out of the networks that have it by then."""
    from diffusers.utils.peft_utils import delete_adapter_layers

    had = {key for key, network in networks.items() if name in getattr(network, "peft_config", {})}
    try:
        yield
    except Exception:
        for key, network in networks.items():
            if key not in had and name in getattr(network, "peft_config", {}):
                delete_adapter_layers(network, name)
        raise
