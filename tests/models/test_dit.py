"""The transformer denoisers against diffusers', at equal weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import models
from latentdiff.conditioning import Conditioning
from latentdiff.models import DiTTransformer2DModel, PixArtTransformer2DModel

SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
}
DIT: dict[str, Any] = SMALL | {"num_embeds_ada_norm": 10}
PIXART: dict[str, Any] = SMALL | {"cross_attention_dim": 24, "caption_channels": 10}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", DIT),
    "dit_affine": ("DiTTransformer2DModel", DIT | {"norm_elementwise_affine": True, "norm_eps": 1e-4}),
    "dit_geglu": ("DiTTransformer2DModel", DIT | {"activation_fn": "geglu", "attention_bias": False}),
    "dit_patch_4": ("DiTTransformer2DModel", DIT | {"patch_size": 4, "out_channels": None}),
    "pixart": ("PixArtTransformer2DModel", PIXART),
    "pixart_sizes": ("PixArtTransformer2DModel", PIXART | {"use_additional_conditions": True}),
    "pixart_states": ("PixArtTransformer2DModel", PIXART | {"caption_channels": None, "cross_attention_dim": 10}),
    "pixart_stretched": ("PixArtTransformer2DModel", PIXART | {"interpolation_scale": 2, "activation_fn": "gelu"}),
}


def inputs(name: str, height: int = 8, width: int = 8) -> dict[str, Any]:
    given: dict[str, Any] = {"hidden_states": torch.randn(2, 4, height, width), "timestep": torch.tensor([1, 977])}
    if name.startswith("dit"):
        return {**given, "class_labels": torch.tensor([3, 10])}
    if name == "pixart_sizes":
        sizes = {"resolution": torch.tensor([[64.0, 80], [64, 64]]), "aspect_ratio": torch.tensor([[0.8], [1.0]])}
        given["added_cond_kwargs"] = sizes
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {**given, "encoder_hidden_states": torch.randn(2, 5, 10), "encoder_attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_are_diffusers(name: str, pair: Callable, same_gradients: Callable) -> None:
    kind, config = CONFIGS[name]
    ours, theirs = pair(kind, **config)
    theirs.eval()  # whose labels are dropped at random in training
    given = inputs(name)
    found, wanted = ours(**given).sample, theirs(**given).sample
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(found)
    for output in (found, wanted):
        (output * weights).sum().backward()
    same_gradients(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(**given, return_dict=False)[0], wanted, atol=1e-5, rtol=1e-5)


def test_pixart_takes_other_shapes_as_diffusers_does(pair: Callable) -> None:
    ours, theirs = pair(*CONFIGS["pixart"][:1], **PIXART)
    given = inputs("pixart", 12, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(**given).sample, theirs(**given).sample, atol=1e-5, rtol=1e-5)


def test_dit_takes_other_squares_as_diffusers_does_and_other_shapes(pair: Callable) -> None:
    ours, theirs = pair("DiTTransformer2DModel", **DIT)
    theirs.eval()
    with torch.no_grad():
        given = inputs("dit", 12, 12)
        torch.testing.assert_close(ours(**given).sample, theirs(**given).sample, atol=1e-5, rtol=1e-5)
        assert ours(**inputs("dit", 4, 10)).sample.shape == (2, 8, 4, 10)


@pytest.mark.parametrize("name", ["dit", "pixart", "pixart_sizes"])
def test_the_parts_give_what_the_whole_does(name: str, pair: Callable) -> None:
    ours, _ = pair(CONFIGS[name][0], **CONFIGS[name][1])
    given = inputs(name)
    sizes = given.get("added_cond_kwargs")
    conditioning = Conditioning(
        states=given.get("encoder_hidden_states"),
        mask=given.get("encoder_attention_mask"),
        labels=given.get("class_labels"),
        sizes=None if sizes is None else torch.cat([sizes["resolution"], sizes["aspect_ratio"]], dim=1),
    )
    with torch.no_grad():
        prepared = ours.prepare(conditioning).select(torch.tensor([1, 0])).select(torch.tensor([1, 0]))
        found = ours.denoise(given["hidden_states"], ours.embed_time(given["timestep"]), prepared)
        whole = ours(given["hidden_states"], timestep=given["timestep"], **conditioning.arguments()).sample
        torch.testing.assert_close(found, ours(**given).sample)
        torch.testing.assert_close(whole, ours(**given).sample)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_gradient_checkpointing_and_fused_projections_change_nothing(name: str, pair: Callable) -> None:
    ours, _ = pair(CONFIGS[name][0], **CONFIGS[name][1])
    given, gradients = inputs(name), []
    for checkpointing in (False, True):
        if checkpointing:
            ours.enable_gradient_checkpointing()
        ours.zero_grad()
        ours(**given).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        wanted = ours(**given).sample
        ours.fuse_qkv_projections()
        torch.testing.assert_close(ours(**given).sample, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dit", "pixart_sizes"])
def test_files_go_both_ways(name: str, tmp_path: Path, pair: Callable, caplog: pytest.LogCaptureFixture) -> None:
    kind, config = CONFIGS[name]
    ours, theirs = pair(kind, **config)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back, read = (
        getattr(diffusers, kind).from_pretrained(tmp_path / "ours"),
        type(ours).from_pretrained(tmp_path / "theirs"),
    )
    assert "not expected" not in caplog.text
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    given = inputs(name)
    with torch.no_grad():
        wanted = ours(**given).sample
        torch.testing.assert_close(read(**given).sample, wanted)
        torch.testing.assert_close(back(**given).sample, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_the_configs_of_released_folders_are_read(kind: str) -> None:
    """Those of DiT-XL-2-256 and of PixArt-XL-2: diffusers' former class of all transformers."""
    dit = kind.startswith("DiT")
    old = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 12,
        "cross_attention_dim": None if dit else 24,
        "double_self_attention": False,
        "dropout": 0.0,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero" if dit else "ada_norm_single",
        "num_attention_heads": 2,
        "num_embeds_ada_norm": 1000,
        "num_layers": 1,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 32,
        "upcast_attention": False,
        "use_linear_projection": False,
        **({} if dit else {"attention_type": "default", "caption_channels": 16, "norm_eps": 1e-6}),
    }
    network = getattr(models, kind).from_config(old)
    assert network.config.num_layers == 1
    with pytest.raises(ValueError, match="double_self_attention"):
        getattr(models, kind).from_config(old | {"double_self_attention": True})


def test_the_released_frequencies_are_in_the_config_only_if_asked_for() -> None:
    assert "freq_shift" not in DiTTransformer2DModel(**DIT).config
    released = DiTTransformer2DModel(**DIT, freq_shift=0)
    assert released.config.freq_shift == 0
    frequencies = 10000 ** (-torch.arange(128) / 128)
    wanted = torch.cat([(977 * frequencies).cos(), (977 * frequencies).sin()])
    torch.testing.assert_close(released.embed_time(977)[0], wanted, atol=1e-4, rtol=0)


def test_training_begins_at_a_prediction_of_zero() -> None:
    for name in ("dit", "pixart"):
        network = getattr(models, CONFIGS[name][0])(**CONFIGS[name][1])
        network.start_from_nothing()
        assert network(**inputs(name)).sample.abs().max() == 0
        network(**inputs(name)).sample.sum().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": (8, 4)}, "sample_size"),
        ({"sample_size": 7}, "sample_size"),
        ({"activation_fn": "swish"}, "activation_fn"),
        ({"dropout": 0.1}, "dropout"),
        ({"num_layers": 0}, "num_layers"),
        ({"attention_head_dim": 3}, "attention_head_dim"),
        ({"norm_type": "layer_norm"}, "norm_type"),
        ({"widht": 3}, "widht"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    for kind, config in ((DiTTransformer2DModel, DIT), (PixArtTransformer2DModel, PIXART)):
        with pytest.raises(ValueError, match=message):
            kind(**{**config, **change})


def test_numbers_without_effect_are_kept_and_change_nothing(pair: Callable) -> None:
    ours, theirs = pair("PixArtTransformer2DModel", **PIXART, num_embeds_ada_norm=8, norm_num_groups=7)
    assert (ours.config.num_embeds_ada_norm, ours.config.norm_num_groups) == (8, 7)
    given = inputs("pixart")
    torch.testing.assert_close(ours(**given).sample, theirs(**given).sample, atol=1e-5, rtol=1e-5)


def test_pixart_refuses_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="cross_attention_dim"):
        PixArtTransformer2DModel(**PIXART | {"cross_attention_dim": 20})
    with pytest.raises(ValueError, match="multiple of 3"):
        PixArtTransformer2DModel(
            **PIXART | {"attention_head_dim": 10, "cross_attention_dim": 20, "use_additional_conditions": True}
        )
    network, given = PixArtTransformer2DModel(**PIXART), inputs("pixart")
    with pytest.raises(ValueError, match="7 wide and caption_channels=10"):
        network(**given | {"encoder_hidden_states": torch.zeros(2, 5, 7)})
    with pytest.raises(ValueError, match="no text states"):
        network.prepare(Conditioning())
    with pytest.raises(ValueError, match="no labels"):
        network.prepare(Conditioning(states=torch.zeros(1, 5, 10), labels=torch.zeros(1)))
    sized = PixArtTransformer2DModel(**PIXART, use_additional_conditions=True)
    with pytest.raises(ValueError, match="resolution is missing"):
        sized(**given)
    with pytest.raises(ValueError, match="8x7"):
        network(**inputs("pixart", 7, 8))
