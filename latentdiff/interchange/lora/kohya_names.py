"""The names of layers in the LoRA formats.

Ours are those of the network: ``unet.down_blocks.0.attentions.0.proj_in``, ``text_encoder.encoder.layers.0.mlp.fc1``.
kohya's names have "_" for every "."; which of them were dots is looked up in a network, or else decided by the words
that occur in the names of Stable Diffusion's networks. diffusers' own converters are private,
guess the dots by replacing text, and write the rank for every alpha.
"""

import re
from collections.abc import Mapping

from latentdiff.interchange.single_file.names import RESNET, UNET_ENDS

UNET, TRANSFORMER, TEXT, TEXT_2 = "unet", "transformer", "text_encoder", "text_encoder_2"
NETWORKS = (UNET, TRANSFORMER, TEXT, TEXT_2)
KOHYA_PREFIXES = {"lora_unet_": UNET, "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": TEXT_2}

JOINED = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|conv_in|conv_out|"
    "conv_shortcut|time_emb_proj|time_embedding|add_embedding|class_embedding|linear_1|linear_2|text_model|"
    "text_projection|self_attn|q_proj|k_proj|v_proj|out_proj|wi_0|wi_1"
)
SINGLE = (
    "attentions|resnets|downsamplers|upsamplers|conv|conv1|conv2|attn1|attn2|ff|net|proj|encoder|layers|mlp|fc1|fc2|"
    "layer|attention|self|output|dense|query|key|value|intermediate|pooler|block|SelfAttention|DenseReluDense|"
    "q|k|v|o|wi|wo"
)
WORDS = rf"{JOINED}|{SINGLE}|\d+"
FLAT_NAME = re.compile(rf"(?:{WORDS})(?:_(?:{WORDS}))*")
FLAT_WORD = re.compile(rf"({WORDS})(?:_|$)")

OLD_CLIP = re.compile(rf"^({TEXT}|{TEXT_2})\.text_model\.")
LDM_NAME = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)")
LDM_OUTSIDE = {place.replace(".", "_"): name.replace(".", "_") for name, place in reversed(UNET_ENDS.items())}
LDM_RESNET = {place.replace(".", "_"): name for name, place in RESNET.items()}


def to_kohya_name(name: str, two_encoders: bool = False) -> str:
    """``unet.mid_block.resnets.0.conv1`` -> ``lora_unet_mid_block_resnets_0_conv1``, as kohya's for Stable Diffusion.

    CLIP's names get the ``text_model`` that they had when the format was made.

    Args:
        two_encoders: the model has two text encoders, and the first is called ``lora_te1_``.

    Raises:
        ValueError: it is of a network that the format does not know.
    """
    network, _, module = name.partition(".")
    if network in (TEXT, TEXT_2) and module.startswith("encoder.layers."):
        module = f"text_model.{module}"
    prefixes = [prefix for prefix, meant in KOHYA_PREFIXES.items() if meant == network]
    if not prefixes:
        raise ValueError(f"{name} is no layer of Stable Diffusion's; kohya's format has no name for it")
    prefix = prefixes[-1 if two_encoders else 0]
    return prefix + module.replace(".", "_")


def from_kohya_name(flat: str, layers_per_block: int = 2, known: Mapping[str, str] | None = None) -> str | None:
    """The inverse of `to_kohya_name`; None for a name that no network of Stable Diffusion has.

    Args:
        flat: in diffusers' blocks or, for the UNet, in those of the original code (``lora_unet_input_blocks_1_1_...``).
        layers_per_block: of the UNet; by it the original's blocks are numbered.
        known: from `flat_names`, if the networks are loaded. Otherwise the words decide.
    """
    prefix = next((prefix for prefix in KOHYA_PREFIXES if flat.startswith(prefix)), None)
    if prefix is None:
        return None
    network, module = KOHYA_PREFIXES[prefix], flat.removeprefix(prefix)
    module = from_ldm_name(module, layers_per_block) if network == UNET else module.removeprefix("text_model_")
    if known is not None and f"{network}_{module}" in known:
        return known[f"{network}_{module}"]
    if not FLAT_NAME.fullmatch(module):
        return None
    return f"{network}.{'.'.join(FLAT_WORD.findall(module))}"


def flat_names(names: list[str]) -> dict[str, str]:
    """A table for `from_kohya_name`, from names such as ``unet.conv_in``."""
    return {name.replace(".text_model.", ".", 1).replace(".", "_"): short(name) for name in names}


def short(name: str) -> str:
    """A name without the ``text_model`` that CLIP's had before transformers 5.6."""
    return OLD_CLIP.sub(r"\1.", name)


def is_ldm_name(flat: str) -> bool:
    """Whether `flat` (kohya's, with its prefix) is a name of the original code's blocks."""
    module = flat.removeprefix("lora_unet_")
    return module in LDM_OUTSIDE or LDM_NAME.fullmatch(module) is not None


def from_ldm_name(flat: str, layers_per_block: int) -> str:
    """A layer of the original Latent Diffusion UNet under its name in diffusers' blocks; other names unchanged.

    The original numbers its blocks consecutively: the first convolution, then for each resolution its layers and a
    downsampler; on the way up one layer more, with the upsampler in the last of them.
    """
    if flat in LDM_OUTSIDE:
        return LDM_OUTSIDE[flat]
    match = LDM_NAME.fullmatch(flat)
    if match is None:
        return flat
    part, number, inner, rest = match[1], int(match[2]), match[3], match[4]
    rest = LDM_RESNET.get(rest, rest)
    if part == "middle_block":
        return f"mid_block_{('resnets_0', 'attentions_0', 'resnets_1')[number]}_{rest}" if number < 3 else flat
    if inner is None:
        return flat
    block, layer = divmod(number - (part == "input_blocks"), layers_per_block + 1)
    way = "down_blocks" if part == "input_blocks" else "up_blocks"
    if rest == "op":
        return f"{way}_{block}_downsamplers_0_conv"
    if rest == "conv":  # the block's third part after attention, otherwise its second
        return f"{way}_{block}_upsamplers_0_conv"
    return f"{way}_{block}_{'attentions' if inner == '1' else 'resnets'}_{layer}_{rest}"
