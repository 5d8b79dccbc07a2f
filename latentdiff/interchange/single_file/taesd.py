"""The files of TAESD: an encoder and a decoder, each an unnamed sequence of layers, in one file or in two."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.single_file.checkpoint import OTHER_KIND, Checkpoint
from latentdiff.interchange.single_file.filling import filled

PARTS = ("encoder", "decoder")
FIRST = {"encoder": 0, "decoder": 1}
"""The number of the first layer with weights: the original's decoder begins with a layer that has none."""

KEY = re.compile(r"(?:(?:taesd_)?(encoder|decoder)\.)?(?:layers\.)?(\d{1,4})\.((?:conv\.\d\.)?(?:weight|bias))")


def read_taesd(files: dict[str, Checkpoint], kind: Any, dtype: torch.dtype | None) -> Any:
    """An `AutoencoderTiny` with the weights of TAESD's files; its shape is inferred from them.

    Args:
        files: by part, "encoder" and "decoder"; the same twice if one file holds both.
        kind: the class.
        dtype: of the weights; None leaves the file's.

    Raises:
        ValueError: a file is of another kind, incomplete, or damaged.
    """
    config = dict(files["encoder"].header.get("vae", {}))
    state: dict[str, Tensor] = {}
    for part in PARTS:
        own = dict(layers_of(files[part], part))
        config |= shape_of(files[part], part, own)
        state |= {f"{part}.layers.{name}": files[part][place] for name, place in own.items()}

    def find(name: str) -> tuple[str, Tensor]:
        file = files[name.split(".")[0]].file
        if name not in state:
            raise ValueError(f"{file}: the weight {name} is missing; {OTHER_KIND}")
        return f"{file}: {name}", state[name]

    config["block_out_channels"] = config["decoder_block_out_channels"]
    network = filled(kind, config, files["encoder"].file, find, dtype)
    if unused := state.keys() - network.state_dict().keys():
        raise ValueError(f"{files['encoder'].file}: {min(unused)} has no place in a TAESD; {OTHER_KIND}")
    return network


def layers_of(file: Checkpoint, part: str) -> Iterator[tuple[str, str]]:
    """The weights of a part, by number of the layer and name in it, with their names in the file."""
    for place in file:
        found = KEY.fullmatch(place)
        if found is not None and found[1] in (None, part):
            yield f"{int(found[2]) - FIRST[part]}.{found[3]}", place


def shape_of(file: Checkpoint, part: str, own: dict[str, str]) -> dict[str, Any]:
    """The part of the config that weights of these names tell."""
    numbers = sorted({int(name.split(".")[0]) for name in own})
    plain = [number for number in numbers if f"{number}.weight" in own]
    if len(plain) < 2 or plain[0] != 0:
        raise ValueError(f"{file.file}: there is no {part} of a TAESD in it; {OTHER_KIND}")
    first, last = own[f"{plain[0]}.weight"], own[f"{plain[-1]}.weight"]
    blocks = tuple(sum(a < number < b for number in numbers) for a, b in itertools.pairwise(plain))
    takes, width, gives = file.size(first, 1), file.size(first), file.size(last)
    sizes = {"in_channels": takes, "latent_channels": gives} if part == "encoder" else {"out_channels": gives}
    return {f"num_{part}_blocks": blocks, f"{part}_block_out_channels": (width,) * len(blocks), **sizes}


def taesd_weights(network: Any) -> dict[str, Tensor]:
    """The weights of an `AutoencoderTiny` by the names that a file with both parts has."""
    weights = {}
    for key, tensor in network.state_dict().items():
        part, _, number, rest = key.split(".", 3)
        weights[f"taesd_{part}.{int(number) + FIRST[part]}.{rest}"] = tensor
    return weights
