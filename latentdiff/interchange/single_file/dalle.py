"""The files of DALL-E's discrete autoencoder, as OpenAI released them: an encoder and a decoder."""

import re
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.single_file.checkpoint import OTHER_KIND, Checkpoint
from latentdiff.interchange.single_file.filling import filled
from latentdiff.interchange.single_file.shapes import Config, numbers

ENDS = {
    "encoder.conv_in": "blocks.input",
    "quantize.proj": "blocks.output.conv",
    "decoder.conv_out": "blocks.output.conv",
}
KINDS = {"weight": "w", "bias": "b"}
FIRST = "blocks.group_1.block_1.res_path.conv_1.w"


def read_dalle(files: dict[str, Checkpoint], kind: Any, dtype: torch.dtype | None) -> Any:
    """A `DalleAutoencoder` with the weights of the released files; its shape is inferred from them.

    Args:
        files: by part, "encoder" and "decoder"; the same twice if one file holds both, with these names before.
        kind: the class.
        dtype: of the weights; None leaves the file's.

    Raises:
        ValueError: a file is of another kind, incomplete, or damaged.
    """
    parts = {name: Part(name, file) for name, file in files.items()}
    config = dalle_config(parts["encoder"], parts["decoder"])

    def find(key: str) -> tuple[str, Tensor]:
        if key == "quantize.embedding.weight":  # a convolution of what is 1 for one code and 0 for the others
            of, name = parts["decoder"], "blocks.input.w"
            found = (of.take(name)[..., 0, 0] + of.take("blocks.input.b")[:, None]).T.contiguous()
        else:
            of, name = parts["decoder" if key.startswith("decoder.") else "encoder"], place(key)
            found = of.take(name)
        return f"{of.file.file}: {name}", found

    network = filled(kind, config, files["encoder"].file, find, dtype)
    for part in parts.values():
        part.check_all_used()
    return network


class Part:
    """One of the two: its weights by the released code's names."""

    def __init__(self, name: str, file: Checkpoint) -> None:
        self.name, self.file = name, file
        self.before = f"{name}." if f"{name}.{FIRST}" in file else ""
        self.used: set[str] = set()
        is_encoder = file.size(self.place(FIRST), 2) == 3 if self.place(FIRST) in file else None
        if is_encoder is None or is_encoder != (name == "encoder"):
            raise ValueError(f"{file.file}: there is no {name} of DALL-E's discrete autoencoder in it; {OTHER_KIND}")

    def place(self, name: str) -> str:
        return self.before + name

    def take(self, name: str) -> Tensor:
        if self.place(name) not in self.file:
            raise ValueError(f"{self.file.file}: {self.place(name)} is missing; {OTHER_KIND}")
        self.used.add(self.place(name))
        return self.file[self.place(name)]

    def size(self, name: str, dimension: int = 0) -> int:
        return self.file.size(self.place(name), dimension)

    def check_all_used(self) -> None:
        """Raises ValueError for a weight that has no place in the network."""
        for name in self.file:
            if name.startswith(self.before) and name not in self.used:
                raise ValueError(f"{self.file.file}: {name} has no place in a DalleAutoencoder; {OTHER_KIND}")


def dalle_config(encoder: Part, decoder: Part) -> Config:
    """Its config."""
    groups = numbers([name.replace("group_", "group.") for name in encoder.file], f"{encoder.before}blocks.group.")
    blocks = {re.sub(r"\.res_path.*", "", name) for name in encoder.file if f"{encoder.before}blocks.group_1." in name}
    widths = [encoder.size(f"blocks.group_{number}.block_1.res_path.conv_4.w") for number in groups]
    return {
        "in_channels": encoder.size("blocks.input.w", 1),
        "out_channels": decoder.size("blocks.output.conv.w") // 2,
        "block_out_channels": widths,
        "layers_per_block": len([name for name in blocks if re.search(r"block_\d+$", name)]),
        "latent_channels": widths[-1],
        "num_vq_embeddings": encoder.size("blocks.output.conv.w"),
        "code_dim": decoder.size("blocks.input.w"),
    }


def place(key: str) -> str:
    """The released code's name of a weight, within its part."""
    module, _, kind = key.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{KINDS[kind]}"
    _, _, level, block, rest = module.split(".", 4)  # encoder.levels.0.1.convs.2
    name = "id_path" if rest == "shortcut" else f"res_path.conv_{int(rest.split('.')[1]) + 1}"
    return f"blocks.group_{int(level) + 1}.block_{int(block) + 1}.{name}.{KINDS[kind]}"
