"""The released models, by the shapes of their weights, against diffusers' reading of their YAML files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
    infer_diffusers_model_type,
)
from torch import Tensor

from latentdiff import AutoencoderKL, UNet2DConditionModel
from latentdiff.interchange.single_file import (
    Checkpoint,
    OriginalSettings,
    assumed_settings,
    original_autoencoder,
    original_unet,
    scheduler_settings,
    unet_config,
    vae_config,
)
from latentdiff.interchange.single_file.shapes import text_config, text_kind

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "transformer_depth": 1,
    "context_dim": 768,
}
SD2_UNET = {key: value for key, value in UNET.items() if key != "num_heads"} | {
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
UPSCALER_UNET = UNET | {
    "in_channels": 7,
    "model_channels": 256,
    "attention_resolutions": [2, 4, 8],
    "channel_mult": [1, 2, 2, 4],
    "disable_self_attentions": [True, True, True, False],
    "num_classes": 1000,
    "context_dim": 1024,
    "use_linear_in_transformer": True,
}
VAE = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4, "in_channels": 3, "out_ch": 3}
RELEASED: dict[str, dict[str, Any]] = {  # the numbers of the YAML files that the models were released with
    "sd1": {"unet": UNET, "vae": VAE, "text": "clip"},
    "inpainting": {"unet": UNET | {"in_channels": 9}, "vae": VAE, "text": "clip"},
    "sd2": {"unet": SD2_UNET, "vae": VAE, "text": "open_clip"},
    "sd2-inpainting": {"unet": SD2_UNET | {"in_channels": 9}, "vae": VAE, "text": "open_clip"},
    "upscaler": {
        "unet": UPSCALER_UNET,
        "vae": VAE | {"ch_mult": [1, 2, 4]},
        "text": "open_clip",
        "linear": (0.0001, 0.02),
        "parameterization": "v",
        "scale_factor": 0.08333,
    },
    "ldm": {"unet": UNET | {"context_dim": 1280}, "vae": VAE, "text": "bert"},
}
DIFFUSERS_NAMES = {
    "sd1": "v1",
    "inpainting": "inpainting",
    "sd2": "v2",
    "sd2-inpainting": "inpainting_v2",
    "upscaler": "upscale",
    "ldm": "v1",  # it knows no other kind
}


def yaml_of(kind: str) -> dict[str, Any]:
    released = RELEASED[kind]
    first, last = released.get("linear", (0.00085, 0.012))
    return {
        "model": {
            "params": {
                "linear_start": first,
                "linear_end": last,
                "timesteps": 1000,
                "scale_factor": released.get("scale_factor", 0.18215),
                "parameterization": released.get("parameterization", "eps"),
                "unet_config": {"params": released["unet"]},
                "first_stage_config": {"params": {"ddconfig": released["vae"]}},
            }
        }
    }


def text_weights(kind: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the text encoders' weights that matter."""
    if kind == "clip":
        body = "cond_stage_model.transformer.text_model."
        layers = {f"{body}encoder.layers.{i}.mlp.fc1.weight": (3072, 768) for i in range(12)}
        return layers | {
            f"{body}embeddings.token_embedding.weight": (49408, 768),
            f"{body}embeddings.position_embedding.weight": (77, 768),
        }
    if kind == "open_clip":
        body = "cond_stage_model.model."
        layers = {f"{body}transformer.resblocks.{i}.mlp.c_fc.weight": (4096, 1024) for i in range(24)}
        return layers | {
            f"{body}token_embedding.weight": (49408, 1024),
            f"{body}positional_embedding": (77, 1024),
            f"{body}text_projection": (1024, 1024),
        }
    body = "cond_stage_model.transformer."
    names = {0: ("1.to_q.weight", (512, 1280)), 1: ("1.net.0.0.weight", (5120, 1280))}
    layers = {f"{body}attn_layers.layers.{i}.{names[i % 2][0]}": names[i % 2][1] for i in range(64)}
    return layers | {f"{body}token_emb.weight": (30522, 1280), f"{body}pos_emb.emb.weight": (77, 1280)}


@pytest.fixture(params=RELEASED)
def released(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Checkpoint, dict[str, Tensor]]:
    """A checkpoint of the model's true size, without values, and what diffusers would read of it."""
    kind = request.param
    of_type = {name: torch.empty(shape, device="meta") for name, shape in text_weights(RELEASED[kind]["text"]).items()}
    hint = {  # diffusers tells the kinds apart before it reads a YAML file
        "model.diffusion_model.input_blocks.0.0.weight": torch.empty(320, RELEASED[kind]["unet"]["in_channels"], 3, 3)
    }
    with torch.device("meta"):
        theirs = create_unet_diffusers_config_from_ldm(yaml_of(kind), hint | typing_hint(kind))
        unet = UNet2DConditionModel.from_config({key: value for key, value in theirs.items() if value is not None})
        vae = AutoencoderKL.from_config(create_vae_diffusers_config_from_ldm(yaml_of(kind), hint | typing_hint(kind)))
    tensors = of_type | original_unet(unet) | original_autoencoder(vae)
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    return kind, Checkpoint(tmp_path / "model.ckpt", allow_pickle=True), tensors


def typing_hint(kind: str) -> dict[str, Tensor]:
    names = {
        "v1": "output_blocks.11.0.skip_connection.weight",
        "upscale": "input_blocks.10.0.skip_connection.bias",
    }
    return {f"model.diffusion_model.{names.get(DIFFUSERS_NAMES[kind], names['v1'])}": torch.empty(1)}


def test_shapes_say_what_the_yaml_files_say(released: tuple[str, Checkpoint, dict[str, Tensor]]) -> None:
    kind, weights, tensors = released
    assert infer_diffusers_model_type(tensors) == DIFFUSERS_NAMES[kind]
    ours, theirs = unet_config(weights), create_unet_diffusers_config_from_ldm(yaml_of(kind), tensors)
    for key, value in theirs.items():
        if key == "sample_size" or value is None:
            continue
        if key == "only_cross_attention":  # of a level without attention nothing can be told
            attends = ["Attn" in block for block in theirs["down_block_types"]]
            assert [a for a, b in zip(ours[key], attends, strict=True) if b] == [
                a for a, b in zip(value, attends, strict=True) if b
            ]
        else:
            assert ours[key] == value, key
    ours, theirs = vae_config(weights), create_vae_diffusers_config_from_ldm(yaml_of(kind), tensors)
    for key, value in theirs.items():
        if key not in ("sample_size", "scaling_factor"):
            assert ours[key] == value, key


def test_what_is_usual_is_what_the_yaml_files_say(
    released: tuple[str, Checkpoint, dict[str, Tensor]], tmp_path: Path
) -> None:
    import yaml

    kind, weights, _ = released
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(yaml_of(kind)))
    read, usual = OriginalSettings.read(tmp_path / "model.yaml"), assumed_settings(weights)
    for key, value in read.said().items():
        if key not in ("heads", "head_channels") and not (kind == "sd2" and key == "prediction_type"):
            assert getattr(usual, key) == value, key
    config = scheduler_settings(usual | read)
    assert (config["beta_schedule"], config["beta_start"]) == (
        "scaled_linear",
        yaml_of(kind)["model"]["params"]["linear_start"],
    )
    sizes = {"sd2": 96, "upscaler": 128, "ldm": 32}
    assert usual.sample_size == sizes.get(kind, 64)
    assert usual.prediction_type == ("v_prediction" if kind in ("sd2", "upscaler") else "epsilon")


def test_text_encoders(released: tuple[str, Checkpoint, dict[str, Tensor]]) -> None:
    kind, weights, _ = released
    assert text_kind(weights) == RELEASED[kind]["text"]
    config = text_config(weights, RELEASED[kind]["text"])
    wanted = {
        "clip": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "open_clip": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
        "bert": {"d_model": 1280, "encoder_layers": 32, "head_dim": 64, "encoder_attention_heads": 8},
    }
    assert config.items() >= wanted[RELEASED[kind]["text"]].items()


def test_the_step_tells_stable_diffusion_2s_kinds_apart(tmp_path: Path) -> None:
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in text_weights("open_clip").items()}
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.empty(320, 4, 3, 3)
        tensors["model.diffusion_model.out.2.weight"] = torch.empty(4, 320, 3, 3)
    for step, prediction, size in ((875000, "epsilon", 64), (140000, "v_prediction", 96)):
        torch.save({"state_dict": tensors, "global_step": step}, tmp_path / "model.ckpt")
        usual = assumed_settings(Checkpoint(tmp_path / "model.ckpt", allow_pickle=True))
        assert (usual.prediction_type, usual.sample_size) == (prediction, size)
