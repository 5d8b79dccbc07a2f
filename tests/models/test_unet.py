from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentdiff.models import AutoencoderKL, TextContext, UNet2DConditionModel

SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
SD2 = SD1 | {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
THREE = SD1 | {
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd2": SD2,
    "no_attention": SD1 | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "no_attention_at_all": SD1
    | {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
    },
    "attention_below": SD1
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "attention_up_only": SD1 | {"down_block_types": ("DownBlock2D",) * 2},
    "inpainting": SD1 | {"in_channels": 9},
    "depths": THREE | {"transformer_layers_per_block": (0, 2, 3), "use_linear_projection": True},
    "layers": THREE | {"layers_per_block": (1, 2, 3), "cross_attention_dim": (12, 12, 12)},
    "no_mid": SD1 | {"mid_block_type": None},
    "time": SD1
    | {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 20,
        "resnet_time_scale_shift": "scale_shift",
        "norm_eps": 1e-4,
    },
    "upscaler": THREE
    | {
        "in_channels": 7,
        "only_cross_attention": (True, False, True),
        "num_class_embeds": 1000,
        "use_linear_projection": True,
    },
    "only_cross": SD1 | {"only_cross_attention": True, "class_embed_type": "timestep"},
    "guides_itself": SD1 | {"time_cond_proj_dim": 6},
    "narrow_without_attention": SD1
    | {
        "block_out_channels": (8, 16),  # 8 is no multiple of 16 heads, and the first level has none
        "attention_head_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "one_level": SD1
    | {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "out_channels": 8,
    },
}


def batch(config: dict[str, Any], size: tuple[int, int] = (8, 8), count: int = 2) -> dict[str, Tensor]:
    labels = {"class_labels": torch.arange(count) + 3}
    return {
        **({"timestep_cond": torch.randn(count, 6)} if "time_cond_proj_dim" in config else {}),
        **(labels if {"num_class_embeds", "class_embed_type"} & set(config) else {}),
        "sample": torch.randn(count, config.get("in_channels", 4), *size, requires_grad=True),
        "timestep": torch.linspace(1, 900, count).long(),
        "encoder_hidden_states": torch.randn(count, 5, 12, requires_grad=True),
    }


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_diffusers_in_output_and_gradients(name: str, pair: Callable, same_gradients: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **CONFIGS[name])
    inputs = batch(CONFIGS[name])
    wanted, found = theirs(**inputs).sample, ours(**inputs).sample
    close(found, wanted)
    weights, ends = torch.randn_like(wanted), [inputs["sample"], inputs["encoder_hidden_states"]]
    losses = (found * weights).mean(), (wanted * weights).mean()
    mine, other = (torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True) for loss in losses)
    close(mine[0], other[0])
    if name == "no_attention_at_all":
        assert mine[1] is None
    else:
        close(mine[1], other[1])
    for loss in losses:
        loss.backward()
    same_gradients(ours, theirs)


@pytest.mark.parametrize("size", [(7, 9), (5, 8), (11, 6)])
def test_sizes_that_do_not_divide(size: tuple[int, int], pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **THREE)
    inputs = batch(THREE, size)
    found = ours(**inputs).sample
    assert found.shape[-2:] == size
    close(found, theirs(**inputs).sample)


@pytest.mark.parametrize("timestep", [7, 7.5, torch.tensor(7), torch.tensor([7]), torch.tensor([7.5, 999.0])])
def test_kinds_of_timestep(timestep: Any, pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **SD1)
    inputs = batch(SD1) | {"timestep": timestep}
    close(ours(**inputs).sample, theirs(**inputs).sample)


def test_text_mask(pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **SD2)
    inputs = batch(SD2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = ours(**inputs, encoder_attention_mask=mask).sample
    close(found, theirs(**inputs, encoder_attention_mask=mask).sample)
    close(ours(**inputs, encoder_attention_mask=mask.bool()).sample, found, tolerance=0)
    assert (found - ours(**inputs).sample)[0].abs().max() > 1e-4
    close(found[1], ours(**inputs).sample[1])


def test_dropout_draws_where_diffusers_draws(pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **SD1, dropout=0.3)
    inputs = batch(SD1)
    outputs = []
    for model, training in ((ours, True), (theirs, True), (ours, False)):
        torch.manual_seed(1)
        outputs.append(model.train(training)(**inputs).sample)
    close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd1", "sd2", "no_attention_at_all", "only_cross"])
def test_the_three_parts_are_the_plain_call(name: str) -> None:
    unet = UNet2DConditionModel(**CONFIGS[name]).eval()
    inputs = batch(CONFIGS[name])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    parts = unet.denoise(
        inputs["sample"],
        unet.embed_time(inputs["timestep"], class_labels=inputs.get("class_labels")),
        unet.encode_text(inputs["encoder_hidden_states"], mask),
    )
    assert torch.equal(parts, unet(**inputs, encoder_attention_mask=mask).sample)


def test_one_time_embedding_serves_the_batch() -> None:
    unet = UNet2DConditionModel(**SD1)
    inputs = batch(SD1)
    time = unet.embed_time(500)
    assert time.shape == (1, 64)
    text = unet.encode_text(inputs["encoder_hidden_states"])
    close(unet.denoise(inputs["sample"], time, text), unet.denoise(inputs["sample"], time.expand(2, -1), text))


def test_text_contexts_in_batches() -> None:
    unet = UNet2DConditionModel(**SD1)
    states, mask = torch.randn(3, 5, 12), torch.tensor([[1, 1, 0, 0, 0]])
    together = unet.encode_text(states)
    assert together.batch_size == 3
    apart = [unet.encode_text(states[i : i + 1]) for i in range(3)]
    for (k, v), (k2, v2) in zip(together.keys_values, TextContext.concatenate(apart).keys_values, strict=True):
        close(k, k2)
        close(v, v2)
    twice = together.repeat(2).select(slice(2, 4))
    assert torch.equal(twice.keys_values[0][0], together.keys_values[0][0][[1, 1]])
    assert together.to(torch.float16).keys_values[-1][1].dtype == torch.float16

    masked = unet.encode_text(states[:1], mask)
    mixed = TextContext.concatenate([masked, apart[1]])
    sample, time = torch.randn(1, 4, 8, 8), unet.embed_time(3)
    found = unet.denoise(torch.cat([sample, sample]), time, mixed)
    close(found[:1], unet.denoise(sample, time, masked))
    close(found[1:], unet.denoise(sample, time, apart[1]))


def test_a_context_of_another_unet_is_refused() -> None:
    other = UNet2DConditionModel(**THREE)
    unet = UNet2DConditionModel(**SD1)
    text = other.encode_text(torch.randn(1, 5, 12))
    with pytest.raises(ValueError, match="for 11 cross-attentions and the UNet has 6"):
        unet.denoise(torch.randn(1, 4, 8, 8), unet.embed_time(1), text)
    with pytest.raises(ValueError, match="text states are 13 wide and cross_attention_dim=12"):
        unet.encode_text(torch.randn(1, 5, 13))


def test_class_labels_are_neither_dropped_nor_forgotten() -> None:
    with pytest.raises(ValueError, match="class_labels were given, but the UNet has no class embeddings"):
        UNet2DConditionModel(**SD1)(**batch(SD1), class_labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="class_labels are missing"):
        UNet2DConditionModel(**SD1, num_class_embeds=3)(**batch(SD1))
    with pytest.raises(ValueError, match="timestep_cond was given, but the UNet has no time_cond_proj_dim"):
        UNet2DConditionModel(**SD1)(**batch(SD1), timestep_cond=torch.zeros(2, 4))


@pytest.mark.parametrize(
    "argument",
    [
        {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 4)}},
        {"attention_mask": torch.ones(2, 5)},
    ],
)
def test_arguments_that_are_not_supported_are_refused(argument: dict[str, Any]) -> None:
    unet = UNet2DConditionModel(**SD1)
    with pytest.raises(ValueError, match=f"{next(iter(argument))} is not supported"):
        unet(**batch(SD1), **argument)


def test_traces_as_one_graph() -> None:
    torch._dynamo.reset()
    unet = UNet2DConditionModel(**SD1)
    inputs = batch(SD1)
    with torch.no_grad():
        wanted = unet(**inputs).sample
        close(torch.compile(unet, backend="eager", fullgraph=True)(**inputs).sample, wanted)
        denoise = torch.compile(unet.denoise, backend="eager", fullgraph=True)
        time, text = unet.embed_time(inputs["timestep"]), unet.encode_text(inputs["encoder_hidden_states"])
        close(denoise(inputs["sample"], time, text), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_gradients(backend: str) -> None:
    torch._dynamo.reset()
    unet = UNet2DConditionModel(**SD2)
    inputs = batch(SD2, size=(7, 9))
    found = torch.compile(unet, backend=backend, fullgraph=True)(**inputs).sample
    close(found, unet(**inputs).sample, tolerance=1e-4)
    found.square().mean().backward()
    assert unet.conv_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["sd1", "depths", "only_cross"])
def test_gradient_checkpointing_changes_nothing(name: str, same_gradients: Callable) -> None:
    unet = UNet2DConditionModel(**CONFIGS[name])
    other = UNet2DConditionModel(**CONFIGS[name])
    other.load_state_dict(unet.state_dict())
    other.enable_gradient_checkpointing()
    assert other.is_gradient_checkpointing
    inputs = batch(CONFIGS[name])
    calls = []
    other.mid_block.resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (unet, other):
        model(**inputs).sample.square().mean().backward()
    assert len(calls) == 2  # once more in the backward pass
    same_gradients(other, unet)
    other.disable_gradient_checkpointing()
    assert not other.is_gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_half_precision_and_memory_formats(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    unet = UNet2DConditionModel(**SD2).eval()
    inputs = batch(SD2)
    with torch.no_grad():
        wanted = unet(**inputs).sample
        unet = unet.to(memory_format=memory_format)
        unet = unet.half() if dtype == torch.float16 else unet.bfloat16()
        found = unet(
            inputs["sample"].to(dtype, memory_format=memory_format),
            inputs["timestep"],
            inputs["encoder_hidden_states"].to(dtype),
        ).sample
    assert found.dtype == dtype
    assert unet.embed_time(3).dtype == dtype
    close(found.float(), wanted, tolerance=0.05)


def test_channels_last_stays_channels_last() -> None:
    unet = UNet2DConditionModel(**SD1).to(memory_format=torch.channels_last)
    sample = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    found = unet(sample, 3, torch.randn(2, 5, 12)).sample
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_attention_scores_beyond_half_precision_stay_finite() -> None:
    """What ``upcast_attention`` is for: the scores would be 16 * 300 * 300 / 4, five times the largest float16."""
    unet = UNet2DConditionModel(**SD2).half()
    attention = unet.cross_attentions[0]
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            layer.weight.fill_(300 / layer.in_features)
        keys_values = attention.keys_values(torch.ones(1, 5, 12).half())
        assert keys_values[0].max() >= 299
        assert attention(torch.ones(1, 7, 16).half(), keys_values).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "60KB"}, {"variant": "fp16"}])
def test_saved_by_one_loaded_by_the_other(options: dict[str, Any], tmp_path: Path, pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **SD2)
    inputs = batch(SD2)
    variant = options.get("variant")
    if variant:
        ours.half(), theirs.half()
        inputs = {k: v.detach().half() if v.is_floating_point() else v for k, v in inputs.items()}
    ours.save_pretrained(tmp_path / "ours", **options)
    theirs.save_pretrained(tmp_path / "theirs", **options)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(
        p.name for p in (tmp_path / "theirs").iterdir()
    )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or "max_shard_size" not in options
    loading = {"torch_dtype": torch.float16, "variant": variant} if variant else {}
    in_ours = UNet2DConditionModel.from_pretrained(tmp_path / "theirs", **loading)
    in_theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours", **loading)
    wanted = theirs.eval()(**inputs).sample
    for model in (in_ours, in_theirs):
        assert model.dtype == wanted.dtype
        close(model(**inputs).sample, wanted, tolerance=5e-3 if variant else 1e-5)
    assert public(in_theirs.config) == public(theirs.config)
    assert public(in_ours.config) == public(theirs.config)


def public(config: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}


def test_works_inside_diffusers_own_pipeline(pair: Callable) -> None:
    """Ours and theirs in diffusers' pipeline, with guidance: the same picture."""
    vae_config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}
    vae_config |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vaes, unets = pair("AutoencoderKL", **vae_config), pair("UNet2DConditionModel", **SD1)
    assert isinstance(vaes[0], AutoencoderKL)
    embeds, negative = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    pictures = []
    for vae, unet in zip(vaes, unets, strict=True):
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_slicing()
        pictures.append(
            pipeline(
                prompt_embeds=embeds,
                negative_prompt_embeds=negative,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
        )
    assert pictures[0].shape == (2, 3, 16, 16)
    close(pictures[0], pictures[1], tolerance=1e-4)


@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "to_out.0"], ["proj_in", "conv1", "ff.net.0.proj"]])
def test_lora_by_peft(targets: list[str], pair: Callable, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = pair("UNet2DConditionModel", **SD1)
    inputs = batch(SD1)
    plain = ours(**inputs).sample
    ours.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = ours(**inputs).sample
    assert (adapted - plain).abs().max() > 1e-3
    ours.save_lora_adapter(tmp_path)
    theirs.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    close(theirs(**inputs).sample, adapted)
    ours.disable_adapters()
    close(ours(**inputs).sample, plain)


def test_freeu_is_diffusers(pair: Callable) -> None:
    ours, theirs = pair("UNet2DConditionModel", **THREE)
    inputs = batch(THREE)
    plain = ours(**inputs).sample
    for unet in (ours, theirs):
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    with torch.no_grad():
        found = ours(**inputs).sample
        close(found, theirs(**inputs).sample)
    assert (found - plain).abs().max() > 1e-3
    ours.disable_freeu()
    assert torch.equal(ours(**inputs).sample, plain)
