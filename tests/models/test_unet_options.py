"""What UNets of other models than Stable Diffusion 1 and 2 have, and what a call or a user may add to any of them."""

import logging
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from small import CODER
from small import UNET as TINY
from torch import Tensor

from latentdiff.conditioning import Conditioning
from latentdiff.models import AutoencoderKL, TextContext, UNet2DConditionModel

UNEVEN = TINY | {
    "layers_per_block": 2,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": [[2, 1], 3],
    "reverse_transformer_layers_per_block": [2, [1, 0, 2]],
}
PROJECTION = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 7}
SIMPLE = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 7}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 7 + 6 * 8,
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sdxl": TINY | TEXT_TIME,
    "projection": TINY | PROJECTION,
    "simple_projection": TINY | SIMPLE,
    "beside_the_time": TINY | SIMPLE | {"class_embeddings_concat": True},
    "labels_beside_the_time": TINY | {"num_class_embeds": 5, "class_embeddings_concat": True},
    "uneven": UNEVEN,
    "fourier": TINY | {"time_embedding_type": "fourier"},
    "fourier_labels": TINY
    | {"time_embedding_type": "fourier", "time_embedding_dim": 24, "class_embed_type": "timestep"},
    "kernels": TINY | {"conv_in_kernel": 1, "conv_out_kernel": 5},
    "heads_that_do_not_divide": TINY | {"attention_head_dim": (3, 5)},
    "linear_heads_that_do_not_divide": TINY | {"attention_head_dim": 7, "use_linear_projection": True},
}


def batch(config: dict[str, Any]) -> dict[str, Tensor]:
    told = {}
    if config.get("class_embed_type") == "timestep":
        told = {"class_labels": torch.tensor([5, 20])}
    elif "class_embed_type" in config:
        told = {"class_labels": torch.randn(2, 7)}
    elif "num_class_embeds" in config:
        told = {"class_labels": torch.tensor([4, 0])}
    elif "addition_embed_type" in config:
        sizes = torch.tensor([[768.0, 512, 0, 64, 768, 512], [1024, 1024, 0, 0, 1024, 1024]])
        told = {"added_cond_kwargs": {"text_embeds": torch.randn(2, 7), "time_ids": sizes}}
    return told | {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 900]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_diffusers_in_output_and_gradients(name: str, pair: Callable, same_gradients: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **CONFIGS[name])
    inputs = batch(CONFIGS[name])
    wanted, found = theirs(**inputs).sample, ours(**inputs).sample
    close(found, wanted)
    weights = torch.randn_like(wanted)
    for output in (found, wanted):
        (output * weights).mean().backward()
    same_gradients(ours, theirs)
    parts = ours.denoise(
        inputs["sample"],
        ours.embed_time(inputs["timestep"], class_labels=inputs.get("class_labels")),
        ours.encode_text(inputs["encoder_hidden_states"], None, inputs.get("added_cond_kwargs")),
    )
    close(parts, found)


def test_sdxls_conditions_are_prepared_once_joined_and_missed() -> None:
    unet, inputs = UNet2DConditionModel(**TINY | TEXT_TIME), batch(TINY | TEXT_TIME)
    added = inputs["added_cond_kwargs"]
    given = Conditioning(inputs["encoder_hidden_states"], None, added["text_embeds"], added["time_ids"])
    with torch.no_grad():
        apart = [unet.prepare(given.select(slice(i, i + 1))) for i in range(2)]
        time = unet.embed_time(inputs["timestep"])
        joined = TextContext.concatenate(apart).repeat(1).select(slice(0, 2)).to(torch.float32)
        close(unet.denoise(inputs["sample"], time, joined), unet(**inputs).sample)
        changed = unet.prepare(given.replace(time_ids=added["time_ids"] + 100)).added
        assert (changed - joined.added).abs().max() > 1e-3
    assert unet.add_embedding in unet.prepared_by()
    with pytest.raises(ValueError, match=r"the pooled embedding \(text_embeds\) of its conditions is missing"):
        unet.prepare(given.replace(pooled=None))
    with pytest.raises(ValueError, match=r"the sizes \(time_ids\) of its conditions is missing"):
        unet.prepare(given.replace(time_ids=None))
    with pytest.raises(ValueError, match="a pooled embedding 9 wide with 6 numbers makes 57"):
        unet.prepare(given.replace(pooled=torch.randn(2, 9)))
    plain = UNet2DConditionModel(**TINY)
    with pytest.raises(ValueError, match="added_cond_kwargs is not supported, but was given"):
        plain(**inputs)


@pytest.mark.parametrize("name", ["beside_the_time", "labels_beside_the_time", "projection"])
def test_one_timestep_serves_all_labels(name: str) -> None:
    unet, inputs = UNet2DConditionModel(**CONFIGS[name]), batch(CONFIGS[name])
    with torch.no_grad():
        close(unet(**inputs | {"timestep": 3}).sample, unet(**inputs | {"timestep": torch.tensor([3, 3])}).sample)


@pytest.mark.parametrize("blocks", [("CrossAttnDownBlock2D", "DownBlock2D"), ("DownBlock2D", "CrossAttnDownBlock2D")])
def test_a_t2i_adapter_adds_what_it_adds_to_diffusers_unet(blocks: tuple[str, str], pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **TINY | {"down_block_types": blocks})
    inputs = batch(TINY)
    first = (2, 16, 8, 8) if blocks[0] == "CrossAttnDownBlock2D" else (2, 16, 4, 4)
    residuals = [torch.randn(first), torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)]
    with torch.no_grad():
        plain, found = ours(**inputs).sample, []
        for count in (1, 2, 3):  # of the first blocks, of all, and of the middle too
            given = residuals[:count]
            wanted = theirs(**inputs, down_intrablock_additional_residuals=[x.clone() for x in given]).sample
            found.append(ours(**inputs, down_intrablock_additional_residuals=given).sample)
            close(found[-1], wanted)
            assert len(given) == count  # diffusers takes them out of the list
        assert min(float((a - b).abs().max()) for a, b in zip([plain, *found], found, strict=False)) > 1e-3
        with pytest.raises(ValueError, match="4 down_intrablock_additional_residuals are more than its 2 blocks"):
            ours(**inputs, down_intrablock_additional_residuals=[*residuals, residuals[-1]])


def test_a_t2i_adapter_of_diffusers_fits(pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **TINY)
    adapter = diffusers.T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    inputs = batch(TINY)
    with torch.no_grad():
        features = adapter(torch.rand(2, 3, 16, 16))
        wanted = theirs(**inputs, down_intrablock_additional_residuals=[x.clone() for x in features]).sample
        close(ours(**inputs, down_intrablock_additional_residuals=features).sample, wanted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"time_embedding_type": "fourier", "time_embedding_dim": 15}, "time_embedding_dim=15 is odd"),
        ({"class_embed_type": "projection"}, "'projection' needs projection_class_embeddings_input_dim"),
        ({"transformer_layers_per_block": [[1], 1]}, "and needs reverse_transformer_layers_per_block"),
        ({"reverse_transformer_layers_per_block": [1]}, r"reverse_.*=\[1\] has 1 entries for 2 levels"),
        ({"reverse_transformer_layers_per_block": [1, [1]]}, r"reverse_.*=\[1\] has 1 entries for 2 levels"),
    ],
)
def test_configs_that_say_too_little(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel(**TINY | config)


def test_a_controlnet_adds_what_it_adds_to_diffusers_unet(pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **TINY)
    controlnet = diffusers.ControlNetModel.from_unet(ours, conditioning_embedding_out_channels=(16, 32))
    for name, weight in ours.state_dict().items():  # it begins with the UNet's weights
        if not name.startswith(("up_blocks", "conv_norm_out", "conv_out")):
            assert torch.equal(controlnet.state_dict()[name], weight)
    for parameter in controlnet.parameters():  # those it begins with say nothing
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = batch(TINY)
    with torch.no_grad():
        down, middle = controlnet(**inputs, controlnet_cond=torch.rand(2, 3, 16, 16), return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        found = ours(**inputs, **residuals).sample
        close(found, theirs(**inputs, **residuals).sample)
        assert (found - ours(**inputs).sample).abs().max() > 1e-3
        time, text = ours.embed_time(inputs["timestep"]), ours.encode_text(inputs["encoder_hidden_states"])
        close(ours.denoise(inputs["sample"], time, text, down, middle), found)
    with pytest.raises(ValueError, match="must be given both or none"):
        ours(**inputs, down_block_additional_residuals=down)


def test_the_scale_of_loras_in_a_call(pair: Callable) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = pair("UNet2DConditionModel", **TINY)
    inputs = batch(TINY)
    with torch.no_grad():
        plain = ours(**inputs).sample
        ours.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        theirs.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        theirs.load_state_dict(ours.state_dict())
        full = ours(**inputs).sample
        for scale in (0.0, 0.5):
            found = ours(**inputs, cross_attention_kwargs={"scale": scale}).sample
            close(found, theirs(**inputs, cross_attention_kwargs={"scale": scale}).sample)
            assert (found - full).abs().max() > 1e-4
        close(ours(**inputs, cross_attention_kwargs={"scale": 0.0}).sample, plain)
        close(ours(**inputs).sample, full)  # as strong as before, also after an error
        with pytest.raises(RuntimeError):
            ours(**inputs | {"sample": torch.randn(2, 5, 8, 8)}, cross_attention_kwargs={"scale": 0.5})
        close(ours(**inputs).sample, full)
        ours.set_adapters("default", 0.3)
        weak = ours(**inputs).sample
        ours(**inputs, cross_attention_kwargs={"scale": 0.0})
        close(ours(**inputs).sample, weak)  # diffusers would set it to 1
    with pytest.raises(ValueError, match="'gligen' is not supported"):
        ours(**inputs, cross_attention_kwargs={"scale": 0.5, "gligen": {}})


FUSED: list[tuple[str, dict[str, Any]]] = [
    ("UNet2DConditionModel", TINY),
    ("UNet2DConditionModel", TINY | {"only_cross_attention": True, "attention_head_dim": (3, 5)}),
    ("AutoencoderKL", CODER),
]


@pytest.mark.parametrize(("name", "config"), FUSED)
def test_fused_projections_change_nothing(name: str, config: dict[str, Any], pair: Callable) -> None:
    ours, theirs = pair(name, **config)
    given: dict[str, Any] = batch(TINY) if "UNet" in name else {"sample": torch.randn(2, 3, 16, 16)}
    keys, original, calls = set(ours.state_dict()), torch.nn.functional.linear, []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(weight.shape)
        return original(x, weight, bias)

    with torch.no_grad():
        plain = ours(**given).sample
        ours.fuse_qkv_projections()
        theirs.fuse_qkv_projections()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", counted)
            fused, of_fused = ours(**given).sample, len(calls)
        close(fused, plain)
        close(fused, theirs(**given).sample)
        assert set(ours.state_dict()) == keys
        ours.unfuse_qkv_projections()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", counted)
            close(ours(**given).sample, plain, 0)
        assert of_fused < len(calls) - of_fused


def test_training_and_loras_do_not_miss_fused_projections() -> None:
    peft = pytest.importorskip("peft")
    unet, inputs = UNet2DConditionModel(**TINY), batch(TINY)
    unet.fuse_qkv_projections()
    unet(**inputs).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    with torch.no_grad():
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        found = unet(**inputs).sample
        with pytest.raises(ValueError, match="projections with LoRAs"):
            unet.fuse_qkv_projections()
        unet.unfuse_qkv_projections()
        close(found, unet(**inputs).sample, 0)


def test_a_scale_for_each_block() -> None:
    """diffusers tells blocks with transformers from those without by whether they have ``attentions``."""
    unet = UNet2DConditionModel(**TINY)
    assert [hasattr(block, "attentions") for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)] == [
        True,
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("slice_size", ["auto", "max", 2, 3])
def test_attention_in_slices_is_the_same(slice_size: str | int) -> None:
    unet = UNet2DConditionModel(**TINY)
    inputs, calls = batch(TINY), []
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        whole = unet(**inputs, encoder_attention_mask=mask).sample
        unet.set_attention_slice(slice_size)
        original = torch.nn.functional.scaled_dot_product_attention

        def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(query.shape[1])
            return original(query, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
            close(unet(**inputs, encoder_attention_mask=mask).sample, whole, tolerance=1e-6)
        unet.set_attention_slice(None)
        close(unet(**inputs, encoder_attention_mask=mask).sample, whole, tolerance=0)
    assert max(calls) == {"auto": 2, "max": 1}.get(slice_size, slice_size)  # type: ignore[call-overload]


@pytest.mark.parametrize("slice_size", [0, 5, "half"])
def test_slices_that_cannot_be(slice_size: Any) -> None:
    with pytest.raises(ValueError, match="from 1 to 4, the heads"):
        UNet2DConditionModel(**TINY).set_attention_slice(slice_size)


def test_other_kinds_of_attention_are_not_silently_left_out(caplog: pytest.LogCaptureFixture) -> None:
    unet, vae = UNet2DConditionModel(**TINY), AutoencoderKL()
    with caplog.at_level(logging.WARNING, logger="latentdiff.models.network"):
        for model in (unet, vae):
            model.set_attention_backend("native")
            with pytest.raises(ValueError, match=f"{type(model).__name__}: there is no attention backend 'flash'"):
                model.set_attention_backend("flash")
            caplog.clear()
            model.enable_xformers_memory_efficient_attention()
            assert [record.message for record in caplog.records] == [
                f"{type(model).__name__}: attention is PyTorch's, which takes as little memory; xFormers is not used"
            ]
