"""How strongly the LoRAs of a network act for a while."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

SCALES: WeakKeyDictionary[nn.Module, tuple[dict[str, float], list[float]]] = WeakKeyDictionary()
"""Of layers that are scaled just now: what their adapters were set to before, and the scales in effect."""


@contextmanager
def lora_scaled(networks: Iterable[nn.Module | None], scale: float) -> Iterator[None]:
    """Within, the LoRAs of `networks` act `scale` times as strongly as they were set to.

    Whatever happens within, they then are as before, and also if several of these end in another order than that in
    which they began, as drawings that are streamed at the same time can.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = (module for network in networks if network is not None for module in network.modules())
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
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
    """Let the adapters of a layer, if they are still there, act as the scales in effect say."""
    before, scales = SCALES[layer]
    strength = math.prod(scales)
    layer.scaling.update({name: strength * value for name, value in before.items() if name in layer.scaling})
