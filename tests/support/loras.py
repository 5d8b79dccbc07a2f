"""LoRAs with random weights for tiny pipelines, as the trainers of others write their files."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = [
    "proj_in",
    "proj_out",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "ff.net.0.proj",
    "downsamplers.0.conv",
]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def lora_weights(network: Any, targets: list[str], rank: int = 3, alpha: float = 6, **config: Any) -> tuple[Any, Any]:
    """PEFT's tensors of a random LoRA for a copy of `network`, and its config."""
    network = copy.deepcopy(network)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **config))
    for name, parameter in network.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return get_peft_model_state_dict(network), network.peft_config["default"].to_dict()


def diffusers_lora(pipeline: Any, folder: Path, text: bool = True, seed: int = 0, **config: Any) -> Path:
    """As diffusers' scripts save it: attention and convolutions, of different ranks and alphas."""
    torch.manual_seed(seed)
    patterns = {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"conv1": 1, "to_q": 4.5}}
    unet, settings = lora_weights(pipeline.unet, ATTENTION + CONVOLUTIONS, **{**patterns, **config})
    layers = {"unet_lora_layers": unet, "unet_lora_adapter_metadata": settings}
    if text:
        encoder, settings = lora_weights(pipeline.text_encoder, CLIP, **{"rank": 2, "alpha": 3, **config})
        layers |= {"text_encoder_lora_layers": encoder, "text_encoder_lora_adapter_metadata": settings}
    if text and getattr(pipeline, "text_encoder_2", None) is not None:
        encoder, settings = lora_weights(pipeline.text_encoder_2, CLIP, **{"rank": 2, "alpha": 1, **config})
        layers |= {"text_encoder_2_lora_layers": encoder, "text_encoder_2_lora_adapter_metadata": settings}
    type(pipeline).save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def sd_scripts_lora(pipeline: Any, file: Path, blocks: dict[str, str] | None = None, seed: int = 0) -> Path:
    """As kohya's sd-scripts write it (networks/lora.py, with conv_dim): half precision, alphas, ``ss_`` header.

    blocks: names of modules to be used instead, where they begin with a key.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    networks = {"lora_unet": pipeline.unet, "lora_te_text_model": pipeline.text_encoder}
    if getattr(pipeline, "text_encoder_2", None) is not None:
        networks["lora_te1_text_model"] = networks.pop("lora_te_text_model")
        networks["lora_te2"] = pipeline.text_encoder_2
    for prefix, network in networks.items():
        for name, module in network.named_modules():
            is_conv = isinstance(module, torch.nn.Conv2d)
            wanted = ("attentions", "resnets", "downsamplers", "upsamplers", "encoder")
            if not (is_conv or isinstance(module, torch.nn.Linear)) or not any(part in name for part in wanted):
                continue
            big = is_conv and module.kernel_size != (1, 1)
            rank, alpha = (2, 1.0) if big else (4, 3.0)
            for start, other in (blocks or {}).items():
                name = other + name.removeprefix(start) if name.startswith(start) else name
            flat = f"{prefix}_{name.replace('.', '_')}"
            out, *inputs = module.weight.shape
            down = torch.randn(rank, *inputs, generator=generator) * 0.2
            up = torch.randn(out, rank, *(1,) * (len(inputs) - 1), generator=generator) * 0.2
            state |= {
                f"{flat}.alpha": torch.tensor(alpha).half(),
                f"{flat}.lora_down.weight": down.half(),
                f"{flat}.lora_up.weight": up.half(),
            }
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "3.0",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1"}',
        "ss_base_model_version": "sd_v1",
        "sshs_model_hash": "0" * 64,
    }
    save_file(state, file, header)
    return file
