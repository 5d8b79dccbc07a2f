"""The LoRAs in a network: the scale at which they act during a call, and networks that must have none."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Lock, RLock
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")

SCALES: WeakKeyDictionary[nn.Module, tuple[dict[str, float], list[float]]] = WeakKeyDictionary()
"""For layers that are scaled at the moment: the scaling of their adapters before, and the scales in effect."""


LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Of networks, each held by a thread that runs the network while LoRAs are in it."""
_LOCKS = Lock()


def lora_lock(network: nn.Module) -> Any:
    """A lock of this network, and of its compiled forms; a thread may take it several times."""
    network = getattr(network, "_orig_mod", network)
    with _LOCKS:
        return LOCKS.setdefault(network, RLock())


@contextmanager
def lora_scaled(networks: Iterable[nn.Module | None], scale: float) -> Iterator[None]:
    """Within this context the LoRAs of `networks` act `scale` times as strongly as they were set to.

    Afterwards they are as before, also after an error, and also if several such contexts end in another order than
    they began. Other threads wait for these networks, here and at `lora_lock`, so that none sees the scale of another.

    Raises:
        ValueError: `scale` is not finite.
    """
    if not math.isfinite(scale):
        raise ValueError(f"LoRAs cannot act {scale} times as strongly; give a finite number")
    from peft.tuners.tuners_utils import BaseTunerLayer

    there = [network for network in networks if network is not None]
    layers = [module for network in there for module in network.modules() if isinstance(module, BaseTunerLayer)]
    with ExitStack() as held:
        for network in sorted(there, key=id):  # everywhere the same order: no two threads wait for each other
            held.enter_context(lora_lock(network))
        for layer in layers:
            SCALES.setdefault(layer, (dict(layer.scaling), []))[1].append(scale)
            set_strengths(layer)
        try:
            yield
        finally:
            for layer in layers:
                SCALES[layer][1].remove(scale)
                set_strengths(layer)
                if not SCALES[layer][1]:
                    del SCALES[layer]


def set_strengths(layer: Any) -> None:
    """Apply the scales in effect to the adapters of a layer that still exist."""
    before, scales = SCALES[layer]
    strength = math.prod(scales)
    layer.scaling.update({name: strength * value for name, value in before.items() if name in layer.scaling})


def with_lora_scale(forward: Callable[P, R]) -> Callable[P, R]:
    """A network's ``forward`` that obeys ``cross_attention_kwargs={"scale": ...}``.

    Raises:
        ValueError: ``cross_attention_kwargs`` has other keys.
    """

    @wraps(forward)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = kwargs.get("cross_attention_kwargs")
        network: Any = args[0]
        scale = lora_scale(type(network).__name__, given)
        if scale == 1.0:
            return forward(*args, **kwargs)
        with lora_scaled([network], scale):
            return forward(*args, **kwargs)

    return call


def lora_scale(name: str, cross_attention_kwargs: Mapping[str, Any] | None) -> float:
    """The scale in ``cross_attention_kwargs``, by default 1. `name`: of the network, for the error."""
    others = dict(cross_attention_kwargs or {})
    scale = others.pop("scale", 1.0)
    for key, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: cross_attention_kwargs {key!r} is not supported, but was given.")
    return float(scale)


def whole_network(network: Any) -> Any:
    """The network itself, where ``torch.compile`` has put a module of its own around it."""
    return getattr(network, "_orig_mod", network)


def refuse_loras(networks: Mapping[str, Any], what: str) -> None:
    """Refuse networks that have LoRAs (or other adapters of PEFT's), also disabled or fused ones.

    Args:
        networks: by their names; what is no network is passed over.
        what: cannot be done with them, such as "saved".

    Raises:
        ValueError: one has, and what to do.
    """
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")  # if it is not loaded, there are no such layers
    for name, network in networks.items() if tuners else ():
        modules = network.modules() if isinstance(network, nn.Module) else ()
        if any(isinstance(module, tuners.BaseTunerLayer) for module in modules):
            raise ValueError(
                f"the {name} has LoRAs loaded, so it cannot be {what}; call unload_lora_weights() to go without them, "
                f"or fuse_lora() and then unload_lora_weights() to keep their effect in the weights "
                f"(save_lora_weights() writes a LoRA itself)"
            )
