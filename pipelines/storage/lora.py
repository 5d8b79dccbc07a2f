"""LoRA into the networks of a pipeline: what of it has a place there, checked before anything is changed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from latentdiff.interchange.lora.formats import LoraFile, with_network
from latentdiff.interchange.lora.layers import Layers, LoraLayer, format_of, of_network, peft_config, read_layers
from latentdiff.interchange.lora.names import flat_names, short


class FittedLora(NamedTuple):
    """A LoRA's layers, under the names that they have in the networks, and which of its keys belong to them."""

    layers: Layers
    matched: list[str]
    unmatched: list[str]

    def config(self, network: str) -> dict[str, Any]:
        """What PEFT's ``LoraConfig`` needs to know for `network`."""
        return peft_config(of_network(self.layers, network))


def fit_lora(
    source: str | Path | dict[str, Tensor],
    networks: Mapping[str, nn.Module],
    weight_name: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> FittedLora:
    """Read a LoRA and find its layers in `networks`, such as {"unet": ..., "text_encoder": ...}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no LoRA, none of its keys has a place, or a matrix does not fit its layer.
    """
    state, config = read_source(source, weight_name, hub or {})
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
    for name, layer in found.items():
        check_fit(name, layer, places[names[name]])
    others = set(unmatched)
    fitted = FittedLora(
        {names[name]: layer for name, layer in found.items()}, [key for key in state if key not in others], unmatched
    )
    for network in networks:
        if of_network(fitted.layers, network):
            fitted.config(network)  # whether PEFT can have it
    return fitted


def read_source(
    source: str | Path | dict[str, Tensor], weight_name: str | None, hub: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors under the names of their format, and the config."""
    if isinstance(source, dict):
        return with_network(source, format_of(source)), None
    file = LoraFile(source, weight_name, **hub)
    return file.state, file.config


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


def check_swappable(lora: FittedLora) -> None:
    """Raises ValueError if PEFT's hotswap, which knows one strength for all layers, would load a LoRA wrongly."""
    if len({round(layer.scale, 6) for layer in lora.layers.values()}) > 1:
        raise ValueError(
            "hotswap: the layers of this LoRA have different strengths (alpha / rank), which PEFT cannot swap in; load "
            "it as an adapter of its own"
        )


def add_to_encoder(text_encoder: Any, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> None:
    """A LoRA into a text encoder other than CLIP's, whose names diffusers' loader does not know.

    tensors: in PEFT's names, without prefix.
    """
    from peft import LoraConfig

    text_encoder.load_adapter(adapter_name=name, adapter_state_dict=dict(tensors), peft_config=LoraConfig(**config))
    text_encoder.to(text_encoder.device, text_encoder.dtype)


def is_clips(names: Iterable[str]) -> bool:
    """Whether layers of a text encoder are of CLIP's attention."""
    return bool({name.rpartition(".")[2] for name in names} & {"q_proj", "k_proj", "v_proj", "out_proj"})


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
