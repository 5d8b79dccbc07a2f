"""Building the networks of a checkpoint and loading their weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.interchange.single_file.autoencoder_configs import autoencoder_kind, vae_config
from latentdiff.interchange.single_file.configs import Config, text_config, text_kind, unet_config
from latentdiff.interchange.single_file.files import Checkpoint, main_dtype
from latentdiff.interchange.single_file.names import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE,
    VAE_PARTS,
    bert_name,
    clip_name,
    gumbel_name,
    open_clip_name,
    unet_name,
    vae_name,
)

Names = Callable[[str], tuple[str, int | None]]
"""From a weight's name in the network to its name in the checkpoint, and which third of it; None for the whole."""


def check_checkpoint(weights: Checkpoint) -> None:
    """Raises ValueError, saying what it is instead, for a file that holds no model of Stable Diffusion's layout."""
    names = list(weights)
    if any(name.startswith("conditioner.") for name in names):
        raise ValueError(f"{weights.file} is a Stable Diffusion XL model, which is not supported")
    if weights.has_unet or weights.has_vae or text_kind(weights) is not None:
        return
    if any("lora" in name for name in names):
        what = "a LoRA; load it with pipeline.load_lora_weights"
    elif any(name.startswith(("down_blocks.", "encoder.down_blocks.")) for name in names):
        what = "one network with diffusers' names; load it with that network's from_pretrained"
    elif any(name.startswith(("emb_params", "string_to_param")) for name in names):
        what = "an embedding; load it with pipeline.load_textual_inversion"
    elif any(name.startswith("model.diffusion_model.joint_blocks.") for name in names):
        what = "a Stable Diffusion 3 model, which is not supported"
    else:
        what = f"something else; its first weight is {names[0]}" if names else "nothing"
    raise ValueError(f"{weights.file} is not a Latent Diffusion or Stable Diffusion checkpoint but {what}")


def whole(name_of: Callable[[str], str]) -> Names:
    return lambda key: (name_of(key), None)


AUTOENCODERS = {
    "AutoencoderKL": "no codebook but a Gaussian's mean and width (AutoencoderKL)",
    "VQModel": "a codebook (VQModel)",
    "GumbelVQModel": "a codebook and a distribution over it (GumbelVQModel)",
}


def fill(
    network: nn.Module, weights: Checkpoint, names: Names, part: str, dtype: torch.dtype, known: Iterable[str] = ()
) -> None:
    """Load the weights of `network`, which may be on the meta device, from a checkpoint.

    Args:
        known: prefixes of names that must all be used.

    Raises:
        ValueError: a weight is missing, has another shape or is not of floating point; or one is unused.
    """
    own = network.state_dict()
    places = {key: names(key) for key in own}
    missing = [name for name, _ in places.values() if name not in weights]
    if missing:
        raise ValueError(
            f"{weights.file}: {len(missing)} weights of the {part} are missing, such as "
            f"{weights.own_name(missing[0])}; the file is incomplete, or of another kind of model"
        )
    used = {name for name, _ in places.values()}
    more = [name for name in weights if name.startswith(tuple(known)) and name not in used]
    if more:
        raise ValueError(
            f"{weights.file}: {len(more)} weights have no place in the {part}, such as {weights.own_name(more[0])}; "
            f"the file is of another kind of model"
        )
    state = {key: take(weights, *place, own[key].shape).to(dtype) for key, place in places.items()}
    network.load_state_dict(state, assign=True)
    network.eval()


def take(weights: Checkpoint, name: str, third: int | None, shape: torch.Size) -> Tensor:
    """A weight, or the first, second or last third of it, as `shape`, which may differ by 1x1 convolutions only."""
    tensor, own = weights[name], weights.own_name(name)
    found = (tensor.shape[0] // 3, *tensor.shape[1:]) if third is not None and tensor.ndim else tuple(tensor.shape)
    if plain_shape(found) != plain_shape(shape) or (third is not None and tensor.shape[0] % 3):
        raise ValueError(
            f"{weights.file}: {own} should have the shape {list(shape)}{'' if third is None else ' three times'}, and "
            f"has {list(tensor.shape)}"
        )
    if tensor.is_meta:
        raise ValueError(f"{weights.file}: {own} has a shape, but no values")
    if not tensor.is_floating_point():
        raise ValueError(f"{weights.file}: {own} is of {tensor.dtype}; quantised weights are not supported")
    part = tensor if third is None else tensor.chunk(3)[third]
    return part.reshape(shape).clone()  # independent of the file, and parts of one tensor must not share memory


def plain_shape(shape: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    return sizes[:2] if sizes[2:] == (1, 1) else sizes


def build_unet(weights: Checkpoint, dtype: torch.dtype | None, changes: Config, kind: Any) -> Any:
    """A UNet with a checkpoint's weights.

    Args:
        kind: the class.
        dtype: of the weights; None keeps the file's.
        changes: to the config that is inferred from the shapes, or that the file holds.

    Raises:
        ValueError: the file has no UNet, or one that is not supported; see `fill`.
    """
    if not weights.has_unet:
        raise ValueError(f"{weights.file} has no UNet; give one with unet=")
    config = {**(weights.header.get("unet") or unet_config(weights)), **changes}
    with torch.device("meta"):
        unet = built(lambda: kind.from_config(config), weights)
    dtype = dtype or main_dtype(weights, UNET)
    fill(unet, weights, whole(lambda key: unet_name(key, unet.config)), "UNet", dtype, [UNET])
    return unet


def build_autoencoder(weights: Checkpoint, dtype: torch.dtype | None, changes: Config, kinds: Mapping[str, Any]) -> Any:
    """An autoencoder with a checkpoint's weights; see `build_unet`.

    Args:
        kinds: the allowed classes, by name.

    Raises:
        ValueError: it is of another class, which the message names.
    """
    if not weights.has_vae:
        raise ValueError(f"{weights.file} has no autoencoder; give one with vae=")
    config = {**(weights.header.get("vae") or vae_config(weights)), **changes}
    kind = autoencoder_kind(weights)
    if kind not in kinds:
        raise ValueError(f"{weights.file} holds {AUTOENCODERS[kind]}; load it with {kind}.from_single_file")
    with torch.device("meta"):
        vae = built(lambda: kinds[kind].from_config(config), weights)
    name_of = gumbel_name if kind == "GumbelVQModel" else vae_name
    known = VAE_PARTS[:4]  # not the codebook's, which can have its training state beside the codes
    dtype = dtype or main_dtype(weights, VAE)
    fill(vae, weights, whole(lambda key: name_of(key, vae.config)), "autoencoder", dtype, known)
    return vae


def built(make: Callable[[], Any], weights: Checkpoint) -> Any:
    """The network that `make` returns.

    Raises:
        ValueError: its config is not supported.
    """
    try:
        return make()
    except Exception as error:  # a foreign config can fail in many places
        raise ValueError(f"{weights.file}: {error}") from error


CLIP_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
BERT_KEYS = (
    "vocab_size",
    "max_position_embeddings",
    "encoder_layers",
    "encoder_ffn_dim",
    "encoder_attention_heads",
    "head_dim",
    "d_model",
    "activation_function",
    "pad_token_id",
)
"""The keys of a config in a file's header that are used; transformers' configs can also name code to download."""


def build_text_encoder(weights: Checkpoint, dtype: torch.dtype | None) -> Any:
    """transformers' CLIP text model, or diffusers' ``LDMBertModel``, with a checkpoint's weights; see `build_unet`."""
    kind = text_kind(weights)
    if kind is None:
        raise ValueError(f"{weights.file} has no text encoder that is known here; give text_encoder= and tokenizer=")
    config = weights.header.get("text_encoder") or text_config(weights, kind)
    config = {key: config[key] for key in (BERT_KEYS if kind == "bert" else CLIP_KEYS) if key in config}
    names: Names = open_clip_name if kind == "open_clip" else whole(bert_name if kind == "bert" else clip_name)
    with torch.device("meta"):
        network = built(lambda: text_network(kind, config), weights)
    dtype = dtype or main_dtype(weights, OPEN_CLIP if kind == "open_clip" else CLIP)
    fill(network, weights, names, "text encoder", dtype)
    for module in network.modules():  # CLIP has its positions in a buffer
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(len(module.position_embedding.weight))[None]
    return network


def text_network(kind: str, config: Config) -> Any:
    """A text encoder with random weights."""
    if kind == "bert":
        from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

        return LDMBertModel(LDMBertConfig(**config))
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def clip_tokenizer(text_encoder: Any) -> Any:
    """CLIP's tokenizer, made from the vocabulary in the installed open_clip, with the padding of the text encoder.

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
