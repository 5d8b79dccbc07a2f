"""Low-rank adapters (LoRA, Hu et al. 2021) of a UNet and a text encoder: added, trained, saved, merged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from latentdiff.interchange.adapter_files import CONFIG_KEYS, LORA_NAMES
from latentdiff.pipelines import LatentPipeline
from latentdiff.training.settings import AdaptedSettings

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


def add_lora(settings: AdaptedSettings, unet: Any, *text_encoders: Any) -> None:
    """Put a new LoRA into the UNet and into the text encoders that are given; only its matrices require a gradient.

    They are float32 whatever the precision of the rest, and change nothing as long as they are not trained: B is zero.

    Raises:
        ValueError: a target is not there.
    """
    add_to(unet, settings, check_targets(unet, settings.lora_targets))
    for text_encoder in text_encoders:
        add_to(text_encoder, settings, text_targets(text_encoder))


def add_to(network: Any, settings: AdaptedSettings, targets: Sequence[str]) -> None:
    from peft import LoraConfig

    network.requires_grad_(False)
    rank = lora_rank(settings)
    config = LoraConfig(
        r=rank, lora_alpha=settings.lora_alpha or rank, target_modules=list(targets), init_lora_weights="gaussian"
    )
    network.add_adapter(config)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_targets(network: nn.Module, targets: Sequence[str]) -> Sequence[str]:
    """`targets`, each of which must end the name of a linear layer or a convolution."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(is_of(name, target) for name in names):
            kinds = sorted({short(name) for name in names})
            raise ValueError(f"lora_targets: the UNet has no layer {target!r}; it has {', '.join(kinds)}")
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


def save_lora(pipeline: LatentPipeline, folder: Path) -> Path:
    """Write the LoRA of the pipeline's networks as ``pytorch_lora_weights.safetensors``, which diffusers loads too.

    diffusers' own loader knows the UNet and CLIP's text encoder; a LoRA of another text encoder loads with our
    pipelines only.

    Returns:
        the file.
    """
    from peft.utils import get_peft_model_state_dict

    saved: dict[str, Any] = {}
    for name in pipeline._lora_loadable_modules:
        network = getattr(pipeline, name)
        config = getattr(network, "peft_config", {}).get("default")
        if config is None:
            continue
        layers = get_peft_model_state_dict(network)
        if type(network).__name__.startswith("CLIPText") and not hasattr(network, "text_model"):
            # transformers 5 has dropped this part of the name; files of LoRA keep it, and loaders take it off
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


def save_and_merge(pipeline: LatentPipeline, folder: Path) -> None:
    """`save_lora`, then `merge_lora`."""
    save_lora(pipeline, folder)
    merge_lora(pipeline)
