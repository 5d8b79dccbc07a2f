"""A pipeline without its weights: what it draws by default is known long before they are read."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.extensions import registered_network
from latentdiff.interchange.folders import check_pipeline_folder
from latentdiff.pipelines.registry import Kind
from latentdiff.pipelines.storage.loading import OUR_CLASSES, transformers_class


def outline(place: Path, kind: Kind, dtype: torch.dtype) -> Any:
    """A folder's pipeline whose networks are on the device "meta": it has sizes and defaults, and cannot draw.

    Raises:
        FileNotFoundError, ValueError: see `check_pipeline_folder`; or the folder's pipeline cannot be had so.
    """
    import latentdiff.models as models

    networks: dict[str, Any] = {}
    with torch.device("meta"):
        for name, entry in check_pipeline_folder(place).items():
            if name in OUR_CLASSES and entry[0] is not None:
                network_class: Any = registered_network(*entry) or getattr(models, entry[1])
                networks[name] = network_class.from_config(network_class.load_config(place / name))
            elif (model_class := transformers_class(entry)) is not None:
                networks[name] = model_class(model_class.config_class.from_pretrained(place / name))
    for network in networks.values():
        nn.Module.to(network, dtype=dtype)  # diffusers' own warns
    return kind.load().from_pretrained(place, **networks, dtype=dtype)
