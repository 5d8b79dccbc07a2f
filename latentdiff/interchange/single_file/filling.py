"""A network filled with weights that a file has by other names and in other forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.single_file.checkpoint import OTHER_KIND


def filled(
    kind: Any, config: dict[str, Any], file: Path, find: Callable[[str], tuple[str, Tensor]], dtype: torch.dtype | None
) -> Any:
    """A network of the class `kind` in evaluation mode.

    Args:
        file: for messages.
        find: for the name of a weight its file and name there, as messages begin with them, and what it is there.
        dtype: of the weights; None leaves the file's.

    Raises:
        ValueError: a weight has another shape, is not of floating point, or not finite.
    """
    from latentdiff.models.network import check_finite  # which imports diffusers

    with torch.device("meta"):
        network = kind.from_config(config)
    state: dict[str, Tensor] = {}
    for key, weight in network.state_dict().items():
        where, found = find(key)
        if found.shape != weight.shape or not found.is_floating_point():
            raise ValueError(
                f"{where} should have the shape {list(weight.shape)}, and has {list(found.shape)} of {found.dtype}; "
                f"{OTHER_KIND}"
            )
        state[key] = found.to(dtype or found.dtype).clone()
    network.load_state_dict(state, assign=True)
    check_finite(network, file)
    return network.eval()
