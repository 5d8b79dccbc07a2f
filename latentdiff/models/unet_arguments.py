"""What a UNet call may be given besides sample, timestep and text. Nothing that is given is silently ignored."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from latentdiff.models.lora_scale import lora_scaled

P = ParamSpec("P")
R = TypeVar("R")


def refuse_given(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"UNet2DConditionModel: {name} is not supported, but was given.")


def check_residuals(down: Sequence[Tensor] | None, middle: Tensor | None) -> tuple[Tensor, ...]:
    """A ControlNet's residuals for the way down; those for the middle come with them."""
    if (down is None) != (middle is None):
        raise ValueError(
            "UNet2DConditionModel: down_block_additional_residuals and mid_block_additional_residual, a ControlNet's, "
            "must be given both or none; the residuals of T2I-Adapters are not supported."
        )
    return () if down is None else tuple(down)


def with_lora_scale(forward: Callable[P, R]) -> Callable[P, R]:
    """Within the call the network's LoRAs act as strongly as ``cross_attention_kwargs={"scale": ...}`` says.

    Raises:
        ValueError: ``cross_attention_kwargs`` has other keys.
    """

    @wraps(forward)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = kwargs.get("cross_attention_kwargs")
        scale = lora_scale(given)
        if scale == 1.0:
            return forward(*args, **kwargs)
        network: Any = args[0]
        with lora_scaled([network], scale):
            return forward(*args, **kwargs)

    return call


def lora_scale(cross_attention_kwargs: Mapping[str, Any] | None) -> float:
    given = dict(cross_attention_kwargs or {})
    scale = given.pop("scale", 1.0)
    refuse_given(**{f"cross_attention_kwargs {name!r}": value for name, value in given.items()})
    return float(scale)
