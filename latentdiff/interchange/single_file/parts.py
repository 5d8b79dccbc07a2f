"""The networks of a checkpoint: built and filled, and named back."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.interchange.single_file.configs import Config, text_config, text_kind, unet_config, vae_config
from latentdiff.interchange.single_file.files import Checkpoint
from latentdiff.interchange.single_file.names import (
    UNET,
    VAE,
    bert_name,
    clip_name,
    open_clip_name,
    unet_name,
    vae_name,
)

Names = Callable[[str], tuple[str, int | None]]
"""A network's own name of a weight to the checkpoint's, and which third of it, or None for all."""


def check_checkpoint(weights: Checkpoint) -> None:
    """Raises ValueError, saying what it is instead, for a file that holds no model of Stable Diffusion's layout."""
    names = list(weights)
    if f"{UNET}input_blocks.0.0.weight" in weights or f"{VAE}encoder.conv_in.weight" in weights:
        return
    if any("lora" in name for name in names):
        what = "a LoRA; load it with pipeline.load_lora_weights"
    elif any(name.startswith(("down_blocks.", "encoder.down_blocks.")) for name in names):
        what = "one network with diffusers' names; load it with that network's from_pretrained"
    elif any(name.startswith(("emb_params", "string_to_param")) for name in names):
        what = "an embedding; load it with pipeline.load_textual_inversion"
    elif any(name.startswith(("conditioner.", "model.diffusion_model.joint_blocks")) for name in names):
        what = "a Stable Diffusion XL or 3 model, which is not supported"
    else:
        what = f"something else; its first weight is {names[0]}" if names else "nothing"
    raise ValueError(f"{weights.file} is not a Latent Diffusion or Stable Diffusion checkpoint but {what}")


def whole(name_of: Callable[[str], str]) -> Names:
    return lambda key: (name_of(key), None)


def fill(network: nn.Module, weights: Checkpoint, names: Names, part: str, dtype: torch.dtype) -> None:
    """Give `network` its weights from a checkpoint.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    state: dict[str, Tensor] = {}
    own = network.state_dict()
    missing = [name for name, _ in map(names, own) if name not in weights]
    if missing:
        raise ValueError(
            f"{weights.file}: {len(missing)} weights of the {part} are missing, such as {missing[0]}; the file is "
            f"incomplete, or of another kind of model"
        )
    for key, wanted in own.items():
        name, third = names(key)
        tensor = weights[name]
        if third is not None:
            tensor = tensor.chunk(3)[third]
        if tensor.squeeze().shape != wanted.squeeze().shape:  # 1x1 convolutions and linear layers pass for each other
            raise ValueError(
                f"{weights.file}: {name} should have the shape {list(wanted.shape)}, and has {list(tensor.shape)}"
            )
        state[key] = tensor.reshape(wanted.shape).to(dtype).contiguous().clone()
    network.load_state_dict(state, assign=True)
    network.eval()


def build_unet(weights: Checkpoint, dtype: torch.dtype, changes: Config) -> Any:
    """Our UNet with a checkpoint's weights.

    Args:
        changes: of the config that is told from the shapes.

    Raises:
        ValueError: there is no UNet in it, or none that ours can be; see `fill`.
    """
    from latentdiff.models import UNet2DConditionModel

    if f"{UNET}input_blocks.0.0.weight" not in weights:
        raise ValueError(f"{weights.file} has no UNet; give one with unet=")
    config = (
        {**weights.header.get("unet", {}), **changes}
        if "unet" in weights.header
        else ({**unet_config(weights), **changes})
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    fill(unet, weights, whole(lambda key: unet_name(key, unet.config)), "UNet", dtype)
    return unet


def build_autoencoder(weights: Checkpoint, dtype: torch.dtype, changes: Config) -> Any:
    """Our autoencoder with a checkpoint's weights; see `build_unet`."""
    from latentdiff.models import AutoencoderKL, VQModel

    if f"{VAE}encoder.conv_in.weight" not in weights:
        raise ValueError(f"{weights.file} has no autoencoder; give one with vae=")
    config = {**(weights.header.get("vae") or vae_config(weights)), **changes}
    kind: Any = VQModel if "num_vq_embeddings" in config else AutoencoderKL
    with torch.device("meta"):
        vae = kind.from_config(config)
    fill(vae, weights, whole(lambda key: vae_name(key, vae.config)), "autoencoder", dtype)
    return vae


def build_text_encoder(weights: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' CLIP text model, or diffusers' ``LDMBertModel``, with a checkpoint's weights; see `build_unet`."""
    kind = text_kind(weights)
    if kind is None:
        raise ValueError(f"{weights.file} has no text encoder that is known here; give text_encoder= and tokenizer=")
    config = weights.header.get("text_encoder") or text_config(weights, kind)
    network: nn.Module
    if kind == "bert":
        from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

        network, names = LDMBertModel(LDMBertConfig(**config)), whole(bert_name)
    else:
        from transformers import CLIPTextConfig, CLIPTextModel

        network = CLIPTextModel(CLIPTextConfig(**config))
        names = whole(clip_name) if kind == "clip" else open_clip_name
    fill(network, weights, names, "text encoder", dtype)
    return network


def clip_tokenizer(text_encoder: Any) -> Any:
    """CLIP's tokenizer, of whose words the installed open_clip has a copy, padded as the text encoder is used to.

    Raises:
        ValueError: the text encoder has another vocabulary.
    """
    if getattr(text_encoder.config, "vocab_size", None) != 49408:
        raise ValueError(
            f"the text encoder, a {type(text_encoder).__name__}, does not have CLIP's vocabulary of 49408 tokens; give "
            f"its tokenizer with tokenizer="
        )
    import open_clip

    from latentdiff.text.open_clip import END, convert_tokenizer

    tokenizer = convert_tokenizer(open_clip.get_tokenizer("ViT-B-32"))
    if text_encoder.config.hidden_act == "quick_gelu":  # Stable Diffusion 1; 2 pads with token 0, as open_clip does
        tokenizer.pad_token = END
    return tokenizer


def original_weights(unet: Any, vae: Any, text_encoder: Any) -> dict[str, Tensor]:
    """The weights of a pipeline's networks under the names of the original checkpoints.

    Raises:
        ValueError: the text encoder is of a kind that those never had.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in unet.state_dict().items():
        named[unet_name(key, unet.config)] = tensor
    for key, tensor in vae.state_dict().items():
        name = vae_name(key, vae.config)
        is_attention = ".attn" in name and not name.endswith(".bias") and ".norm." not in name
        named[name] = tensor[..., None, None] if is_attention else tensor  # 1x1 convolutions there
    return named | original_text_weights(text_encoder)


def original_text_weights(text_encoder: Any) -> dict[str, Tensor]:
    state: Mapping[str, Tensor] = text_encoder.state_dict()
    kind = type(text_encoder).__name__
    if kind == "LDMBertModel":
        return {bert_name(key): tensor for key, tensor in state.items()}
    if kind != "CLIPTextModel":
        raise ValueError(
            f"a single file holds the text encoder of Stable Diffusion (CLIP) or Latent Diffusion, not a {kind}; "
            f"save_pretrained saves any pipeline as a folder"
        )
    if text_encoder.config.hidden_act == "quick_gelu":
        return {clip_name(key): tensor for key, tensor in state.items()}
    thirds: dict[str, dict[int, Tensor]] = {}
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, third = open_clip_name(key)
        if third is None:
            named[name] = tensor
        else:
            thirds.setdefault(name, {})[third] = tensor
    return named | {name: torch.cat([found[i] for i in range(3)]) for name, found in thirds.items()}
