"""The networks of a checkpoint: built from its shapes or header and filled with its weights."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.interchange.single_file.checkpoint import OTHER_KIND, Checkpoint
from latentdiff.interchange.single_file.names import ALONE, FIRST, LAYOUTS, SECOND, Layout
from latentdiff.interchange.single_file.settings import XL_SCALE, assumed_settings, autoencoder_settings, measured_scale
from latentdiff.interchange.single_file.shapes import (
    Config,
    autoencoder_kind,
    text_config,
    text_kind,
    unet_config,
    vae_config,
)
from latentdiff.interchange.single_file.taesd import read_taesd

logger = logging.getLogger(__name__)

TRAINED_ON = 256
"""Side in pixels of the pictures on which all released autoencoders were trained."""

AUTOENCODERS = {
    "AutoencoderKL": "no codebook but a Gaussian's mean and width (AutoencoderKL)",
    "VQModel": "a codebook (VQModel)",
    "GumbelVQModel": "a codebook and a distribution over it (GumbelVQModel)",
}
FURTHER_KEYS = ("layer_norm_eps", "activation_function", "pad_token_id")
"""Of a text encoder's config in a header, besides those that shapes tell; transformers' can also name code to download.
"""


def check_checkpoint(weights: Checkpoint) -> None:
    """Raises ValueError, saying what it is instead, for a file that holds no model of Stable Diffusion's layout."""
    names = list(weights)
    if any(name.startswith("conditioner.") for name in names):
        check_two_encoders(weights)
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


def check_two_encoders(weights: Checkpoint) -> None:
    """Raises ValueError for a file of Stable Diffusion XL that does not hold both text encoders, or its refiner's."""
    needed = [(FIRST, "text_model.embeddings.token_embedding.weight"), (SECOND, "text_projection")]
    if any(name.startswith(ALONE) for name in weights):
        needed = [(ALONE, "token_embedding.weight"), (ALONE, "text_projection")]
    for beginning, name in needed:
        if f"{beginning}{name}" not in weights:
            raise ValueError(f"{weights.file} is a Stable Diffusion XL model and lacks {beginning}{name}; {OTHER_KIND}")


def build(weights: Checkpoint, layout: Layout, make: Callable[[], Any], dtype: torch.dtype | None) -> Any:
    """The network that `make` returns, with a checkpoint's weights.

    Args:
        dtype: of the weights; None keeps the file's.

    Raises:
        ValueError: the config is not supported; a weight is missing, has another shape or is not of floating point; or
            one is unused.
    """
    from latentdiff.models.network import check_finite  # which imports diffusers

    with torch.device("meta"):
        try:
            network = make()
        except Exception as error:  # a foreign config can fail in many places
            raise ValueError(f"{weights.file}: {error}") from error
    own = network.state_dict()
    places = {key: layout.place(key, network.config) for key in own}
    used = {name for name, _ in places.values()}
    missing = [weights.own_name(name) for name, _ in places.values() if name not in weights]
    if missing:
        raise ValueError(
            f"{weights.file}: {len(missing)} weights of the {layout.part} are missing, such as {missing[0]}; "
            f"{OTHER_KIND}"
        )
    unused = [weights.own_name(name) for name in weights if name.startswith(layout.complete) and name not in used]
    if unused:
        raise ValueError(
            f"{weights.file}: {len(unused)} weights have no place in the {layout.part}, such as {unused[0]}; "
            f"the file is of another kind of model"
        )
    dtype = dtype or weights.main_dtype(layout.beginning)
    state = {
        key: take(weights, name, third, own[key].shape, name in layout.transposed).to(dtype)
        for key, (name, third) in places.items()
    }
    network.load_state_dict(state, assign=True)
    check_finite(network, weights.file)
    return network.eval()


def take(weights: Checkpoint, name: str, third: int | None, shape: Sequence[int], transposed: bool = False) -> Tensor:
    """A weight, or the first, second or last third of it, as `shape`, which may differ by 1x1 convolutions only."""
    if transposed:
        return take(weights, name, third, shape[::-1]).T.contiguous()
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
        ValueError: the file has no UNet, or one that is not supported; see `build`.
    """
    if not weights.has_unet:
        raise ValueError(f"{weights.file} has no UNet; give one with unet=")
    config = {**(weights.header.get("unet") or unet_config(weights)), **changes}
    return build(weights, LAYOUTS["unet"], lambda: kind.from_config(config), dtype)


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
    layout = LAYOUTS["gumbel" if kind == "GumbelVQModel" else "vae"]
    return build(weights, layout, lambda: kinds[kind].from_config(config), dtype)


def read_autoencoder(
    weights: Checkpoint,
    kinds: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    scaling_factor: float | None = None,
    sample_size: int | None = None,
    original_config: str | Path | None = None,
) -> Any:
    """The autoencoder in a checkpoint, which may hold a whole model; see `SingleFileModel.from_single_file`.

    Args:
        kinds: the allowed classes, by name.

    Raises:
        FileNotFoundError, ValueError: see there.
    """
    if scaling_factor is not None and not 0 < scaling_factor < float("inf"):
        raise ValueError(f"scaling_factor={scaling_factor} should be a number above 0")
    if not weights.has_vae:
        check_checkpoint(weights)
        raise ValueError(f"{weights.file} has no autoencoder")
    if weights.is_taesd:
        if "AutoencoderTiny" not in kinds:
            raise ValueError(f"{weights.file} holds a TAESD; load it with AutoencoderTiny.from_single_file")
        return read_taesd({"encoder": weights, "decoder": weights}, kinds["AutoencoderTiny"], dtype)
    given = {"sample_size": sample_size, "scaling_factor": scaling_factor}
    given = {key: value for key, value in given.items() if value is not None}
    if original_config is not None:
        given = autoencoder_settings(Path(original_config).expanduser()) | given
    if "vae" in weights.header:
        return build_autoencoder(weights, dtype, given, kinds)
    vae = build_autoencoder(weights, dtype, usual_autoencoder(weights) | given, kinds)
    shape = (vae.config["latent_channels"], len(vae.config["block_out_channels"]))
    is_known = "num_vq_embeddings" in vae.config or measured_scale(weights) is not None or weights.has_unet
    if "scaling_factor" not in given and not is_known and shape != (4, 4):  # not a Gaussian of Stable Diffusion's
        logger.warning(
            "%s does not say how its latents are scaled; scaling_factor=%g is assumed. It matters only to a denoiser: "
            "give scaling_factor= (--scaling-factor) as the one was trained with",
            *(weights.file, vae.config["scaling_factor"]),
        )
    return vae


def usual_autoencoder(weights: Checkpoint) -> Config:
    """Default settings that the weights do not contain, for an autoencoder alone or in a whole model."""
    assumed, size = assumed_settings(weights), TRAINED_ON
    if weights.has_unet:
        size = (assumed.sample_size or 64) * 2 ** (len(vae_config(weights)["block_out_channels"]) - 1)
    is_xl = any(name.startswith("conditioner.") for name in weights)
    return {"sample_size": size, "scaling_factor": XL_SCALE if is_xl else assumed.scaling_factor}


def build_text_encoder(weights: Checkpoint, dtype: torch.dtype | None, part: str = "text_encoder") -> Any:
    """transformers' CLIP text model, or diffusers' ``LDMBertModel``, with a checkpoint's weights; see `build_unet`.

    part: "text_encoder", or "text_encoder_2" for SDXL's second, which its refiner has alone.
    """
    kind = text_kind(weights)
    kind = "second of two" if part == "text_encoder_2" and kind == "first of two" else kind
    if kind is None:
        raise ValueError(f"{weights.file} has no text encoder that is known here; give text_encoder= and tokenizer=")
    config = text_config(weights, kind)
    said = weights.header.get(part, {})
    config |= {key: said[key] for key in (*config, *FURTHER_KEYS) if key in said}
    network = build(weights, LAYOUTS[kind], lambda: random_text_encoder(kind, config), dtype)
    for module in network.modules():  # CLIP has its positions in a buffer
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(len(module.position_embedding.weight))[None]
    return network


def random_text_encoder(kind: str, config: Config) -> nn.Module:
    if kind == "bert":
        from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

        bert: nn.Module = LDMBertModel(LDMBertConfig(**config))
        return bert
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip: Any = CLIPTextModelWithProjection if kind.startswith("second") else CLIPTextModel
    made: nn.Module = clip(CLIPTextConfig(**config))
    return made


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
