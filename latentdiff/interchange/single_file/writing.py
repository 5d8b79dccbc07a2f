"""Writing the networks of a pipeline under the names of the original checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.interchange.adapter_files import save_whole
from latentdiff.interchange.single_file.checkpoint import HEADER
from latentdiff.interchange.single_file.names import LAYOUTS, VAE, Layout
from latentdiff.interchange.single_file.settings import SPEC
from latentdiff.interchange.single_file.taesd import taesd_weights


class NoOriginalNamesError(ValueError):
    """A network is of a kind that the original code never had."""


SPEC_NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
"""Prediction types as they stand in files' headers."""


def original_unet(unet: Any) -> dict[str, Tensor]:
    """A UNet's weights by their original names.

    Raises:
        NoOriginalNamesError: it has weights that the original code does not have.
    """
    return original_weights(unet, LAYOUTS["unet"])


def original_autoencoder(vae: Any) -> dict[str, Tensor]:
    """An autoencoder's weights by their original names; see `original_unet`."""
    if "levels" in vae.config or "layers_per_block" not in vae.config:
        raise NoOriginalNamesError(
            f"a single file holds an AutoencoderKL, VQModel or GumbelVQModel, not {type(vae).__name__}, which the "
            f"original code never had; save_pretrained saves it as a folder"
        )
    is_gumbel = hasattr(getattr(vae, "quantize", None), "proj")
    weights = original_weights(vae, LAYOUTS["gumbel" if is_gumbel else "vae"])
    return {
        # the original attention consists of 1x1 convolutions
        name: tensor[..., None, None] if ".attn" in name and tensor.ndim == 2 else tensor
        for name, tensor in weights.items()
    }


def original_text_encoder(text_encoder: Any) -> dict[str, Tensor]:
    """A text encoder's weights by their original names: with CLIP's fast GELU as in Stable Diffusion 1, else as in 2.

    Stable Diffusion 2 never uses the last layer of its text tower, so neither diffusers nor this package keeps it, and
    it cannot be written. Programs that build it report it (and the projection) as missing; their pictures are the same.

    Raises:
        NoOriginalNamesError: the original code has no such text encoder.
    """
    kind = type(text_encoder).__name__
    if kind == "LDMBertModel":
        return original_weights(text_encoder, LAYOUTS["bert"])
    if kind != "CLIPTextModel":
        raise NoOriginalNamesError(
            f"a single file holds the text encoder of Stable Diffusion (CLIP) or Latent Diffusion, not a {kind}, which "
            f"the original code never had; save_pretrained saves any pipeline as a folder"
        )
    is_first = text_encoder.config.hidden_act == "quick_gelu"
    return original_weights(text_encoder, LAYOUTS["clip" if is_first else "open_clip"])


def original_text_encoders(first: Any, second: Any) -> dict[str, Tensor]:
    """The weights of SDXL's text encoders by their original names.

    first: None in its refiner.

    Raises:
        NoOriginalNamesError: they are others than SDXL's.
    """
    encoders = [one for one in (first, second) if one is not None]
    kinds = [(type(one).__name__, getattr(one.config, "hidden_act", None)) for one in encoders]
    if kinds != [("CLIPTextModel", "quick_gelu"), ("CLIPTextModelWithProjection", "gelu")][-len(kinds) :]:
        raise NoOriginalNamesError(f"a single file of SDXL holds its two CLIP text encoders, and these are {kinds}")
    if first is None:
        return original_weights(second, LAYOUTS["second alone"])
    layouts = (LAYOUTS["first of two"], LAYOUTS["second of two"])
    return original_weights(first, layouts[0]) | original_weights(second, layouts[1])


def original_weights(network: Any, layout: Layout) -> dict[str, Tensor]:
    """A network's weights by their original names, with what the original stacks in one tensor.

    Raises:
        NoOriginalNamesError: one of them has none.
        ValueError: there is a LoRA among them.
    """
    found: dict[str, dict[int | None, Tensor]] = {}
    for key, tensor in network.state_dict().items():
        if ".base_layer." in key or ".lora_" in key:
            raise ValueError(
                f"the {layout.part} has a LoRA loaded, which original checkpoints cannot hold; fuse and unload it"
            )
        try:
            name, third = layout.place(key, network.config)
        except (KeyError, ValueError, IndexError):
            raise NoOriginalNamesError(f"original checkpoints have no name for the {layout.part}'s {key}") from None
        found.setdefault(name, {})[third] = tensor
    joined = {
        name: parts[None] if None in parts else torch.cat([parts[third] for third in range(len(parts))])
        for name, parts in found.items()
    }
    return {name: tensor.T if name in layout.transposed else tensor for name, tensor in joined.items()}


def autoencoder_alone(vae: Any) -> dict[str, Tensor]:
    """An autoencoder's weights as in files of autoencoders alone: without the prefix of their original names."""
    if "num_decoder_blocks" in vae.config:
        return taesd_weights(vae)
    return {name.removeprefix(VAE): tensor for name, tensor in original_autoencoder(vae).items()}


def header_of_parts(configs: Mapping[str, Any]) -> dict[str, str]:
    """A file's header with the configs of its components, and what other programs must know to sample from it."""
    predicts = SPEC_NAMES.get(configs.get("scheduler", {}).get("prediction_type"))
    said = {f"{SPEC}prediction_type": predicts} if predicts else {}
    return {"format": "pt", HEADER: json.dumps(configs, sort_keys=True), **said}


def write_checkpoint(
    weights: dict[str, Tensor], header: dict[str, str], file: str | Path, dtype: torch.dtype | None, overwrite: bool
) -> None:
    """Write weights under their original names; whole or not at all.

    Raises:
        FileExistsError: the file is there, and `overwrite` is False.
        ValueError: it is not named ``.safetensors``.
    """
    file = Path(file).expanduser()
    check_target(file, overwrite)
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_whole(weights, file, header)


def check_target(file: Path, overwrite: bool) -> None:
    """Raises ValueError or FileExistsError for a checkpoint that cannot or must not be written."""
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: the weights are written as safetensors; name it {file.stem}.safetensors")
    if file.is_dir() or (file.exists() and not overwrite):
        raise FileExistsError(f"{file} is there already; choose another name, or --overwrite (overwrite=True)")


def plain_config(part: Any) -> dict[str, Any]:
    """A component's config without private keys and values that JSON cannot hold."""
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    return {key: value for key, value in config.items() if not key.startswith("_") and is_plain(value)}


def is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
