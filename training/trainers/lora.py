"""LoRA (Hu et al. 2021) and its relatives, by PEFT, in a UNet and a text encoder: added, trained, saved, merged."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.interchange.adapter_files import CONFIG_KEYS, LORA_NAMES, LYCORIS_NAME, save_whole
from latentdiff.interchange.atomic import json_text, write_text_whole
from latentdiff.interchange.lora.formats import CONFIG_NAME
from latentdiff.interchange.lora.kohya_names import to_kohya_name
from latentdiff.interchange.lora.layers import PEFT_PREFIX
from latentdiff.pipelines import LatentPipeline, TextToImagePipeline
from latentdiff.training.settings import AdaptedSettings
from latentdiff.training.settings.finetune import Adapter

DEFAULT_RANK = 16

TEXT_TARGETS = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # CLIP
    ("query", "key", "value", "attention.output.dense"),  # BERT and its kin
    ("q", "k", "v", "o"),  # T5
)
"""The attention's projections, by what each kind of text encoder calls them."""


def lora_rank(settings: AdaptedSettings) -> int:
    """The rank that the settings ask for; 0: no LoRA, the weights themselves are trained."""
    return settings.lora_rank or (DEFAULT_RANK if settings.method == "lora" else 0)


def add_lora(settings: AdaptedSettings, unet: Any, *text_encoders: Any, kind: Adapter = "lora") -> None:
    """Put a new adapter into the UNet and into the text encoders that are given; only its matrices require a gradient.

    They are float32 whatever the precision of the rest, and change nothing as long as they are not trained.

    Raises:
        ValueError: a target is not there.
    """
    add_to(unet, settings, check_targets(unet, settings.lora_targets), kind)
    for text_encoder in text_encoders:
        add_to(text_encoder, settings, text_targets(text_encoder), kind)


def adapter_config(settings: AdaptedSettings, targets: Sequence[str], kind: Adapter) -> Any:
    """PEFT's config of a new adapter: of `lora_rank`, which are the sides of OFT's blocks."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    rank, modules = lora_rank(settings), list(targets)
    alpha: Any = settings.lora_alpha or rank
    if kind == "oft":  # Qiu et al. 2023
        return OFTConfig(oft_block_size=rank, target_modules=modules)
    if kind in ("loha", "lokr"):
        return {"loha": LoHaConfig, "lokr": LoKrConfig}[kind](r=rank, alpha=alpha, target_modules=modules)
    gaussian: Any = "gaussian"
    dora = kind == "dora"  # Liu et al. 2024
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, init_lora_weights=gaussian, use_dora=dora)


def add_to(network: Any, settings: AdaptedSettings, targets: Sequence[str], kind: Adapter) -> None:
    network.requires_grad_(False)
    network.add_adapter(adapter_config(settings, targets, kind))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_targets(network: nn.Module, targets: Sequence[str]) -> Sequence[str]:
    """`targets`, each of which must end the name of a linear layer or a convolution."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(is_of(name, target) for name in names):
            kinds = sorted({short(name) for name in names})
            raise ValueError(f"lora_targets: the denoiser has no layer {target!r}; it has {', '.join(kinds)}")
    if not targets:
        raise ValueError("lora_targets is empty; name at least one kind of layer, such as to_q")
    return targets


def text_targets(text_encoder: nn.Module) -> Sequence[str]:
    """What a LoRA of this text encoder changes: its attention's projections."""
    names = [name for name, module in text_encoder.named_modules() if isinstance(module, nn.Linear)]
    for targets in TEXT_TARGETS:
        if all(any(is_of(name, target) for name in names) for target in targets):
            return targets
    raise ValueError(
        f"train_text_encoder: it is not known where a {type(text_encoder).__name__} takes a LoRA; use method=full"
    )


def is_of(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def short(name: str) -> str:
    """The end of a layer's name that says its kind: without the numbers of blocks."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def adapters(pipeline: LatentPipeline) -> Iterator[tuple[str, Any, Any, dict[str, Tensor]]]:
    """The networks that have an adapter: name, network, and PEFT's config and tensors."""
    from peft.utils import get_peft_model_state_dict

    for name in pipeline._lora_loadable_modules:
        network = getattr(pipeline, name)
        config = getattr(network, "peft_config", {}).get("default")
        if config is not None:
            yield name, network, config, get_peft_model_state_dict(network)


def save_lora(pipeline: LatentPipeline, folder: Path) -> Path:
    """Write the LoRA of the pipeline's networks as ``pytorch_lora_weights.safetensors``, which diffusers loads too.

    diffusers' own loader knows the UNet and CLIP's text encoder; a LoRA of another text encoder loads with our
    pipelines only.

    Returns:
        the file.
    """
    saved: dict[str, Any] = {}
    for name, network, config, layers in adapters(pipeline):
        if type(network).__name__.startswith("CLIPText") and not hasattr(network, "text_model"):
            # transformers 5.6 has dropped this part of the name; files of LoRA keep it, and loaders take it off
            layers = {f"text_model.{key}": tensor for key, tensor in layers.items()}
        saved[f"{name}_lora_layers"] = layers
        meaning = {key: value for key, value in config.to_dict().items() if key in CONFIG_KEYS}
        saved[f"{name}_lora_adapter_metadata"] = meaning
    type(pipeline).save_lora_weights(folder, **saved)
    return folder / LORA_NAMES[0]


def merge_lora(pipeline: LatentPipeline) -> None:
    """Add the LoRA to the weights it was made for, and take the adapters out."""
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def save_adapter(pipeline: TextToImagePipeline, folder: Path, kind: Adapter) -> None:
    """Write the adapter: LoRA and DoRA as `save_lora` does, LoHa and LoKr in LyCORIS's format, which others read too.

    All but LoRA and DoRA are in PEFT's format too, in ``adapter/NETWORK``.
    """
    if kind in ("lora", "dora"):
        save_lora(pipeline, folder)
        return
    flat, two = dict[str, Tensor](), pipeline.for_sdxl
    for name, _, config, state in adapters(pipeline):
        place = folder / "adapter" / name
        save_whole({f"{PEFT_PREFIX}{key}": tensor for key, tensor in state.items()}, place / LORA_NAMES[1])
        said = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": None}
        said = {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}
        write_text_whole(place / CONFIG_NAME, json_text(said))
        flat |= lycoris_tensors({f"{name}.{key}": tensor for key, tensor in state.items()}, config, two)
    if kind != "oft":
        header = {"format": "pt", "ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": kind})}
        save_whole(flat, folder / LYCORIS_NAME, header)


def lycoris_tensors(state: Mapping[str, Tensor], config: Any, two_encoders: bool = False) -> dict[str, Tensor]:
    """PEFT's tensors of a LoHa or LoKr, with the network's name, under LyCORIS's, with alphas.

    LyCORIS does not scale a product of two whole matrices, so its first one is scaled here.
    """
    found: dict[str, Tensor] = {}
    names = {key.rpartition(".")[0] for key in state}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        if part == "lokr_w1" and f"{name}.lokr_w2" in state:
            tensor = tensor * (config.alpha / config.r)
        found[f"{to_kohya_name(name, two_encoders)}.{part}"] = tensor
    for name in names if hasattr(config, "alpha") else ():
        whole = {f"{name}.lokr_w1", f"{name}.lokr_w2"} <= state.keys()
        found[f"{to_kohya_name(name, two_encoders)}.alpha"] = torch.tensor(float(config.r if whole else config.alpha))
    return found


def save_and_merge(pipeline: TextToImagePipeline, folder: Path, kind: Adapter = "lora") -> None:
    """`save_adapter`, then `merge_lora`."""
    save_adapter(pipeline, folder, kind)
    merge_lora(pipeline)
