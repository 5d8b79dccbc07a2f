from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentdiff import models

BASE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
ATTENTION = BASE | {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
KL: dict[str, dict[str, Any]] = {
    "plain": BASE,
    "deeper": BASE
    | {
        "block_out_channels": (8, 12, 16),
        "layers_per_block": 2,
        "latent_channels": 6,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "attention": ATTENTION,
    "bare": BASE | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
    "channels": BASE | {"in_channels": 1, "out_channels": 4, "shift_factor": 0.1, "scaling_factor": 0.3},
}
VQ: dict[str, dict[str, Any]] = {
    "plain": BASE,
    "attention": ATTENTION | {"vq_embed_dim": 5, "num_vq_embeddings": 32},
    "bare": BASE | {"mid_block_add_attention": False, "latent_channels": 4},
}
BOTH = [("AutoencoderKL", name) for name in KL] + [("VQModel", name) for name in VQ]


def config_of(kind: str, name: str) -> dict[str, Any]:
    return (KL if kind == "AutoencoderKL" else VQ)[name]


def pixels(config: dict[str, Any], size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.rand(2, config.get("in_channels", 3), *size) * 2 - 1


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("kind", "name"), BOTH)
def test_agrees_with_diffusers_in_output_and_gradients(
    kind: str, name: str, pair: Callable, same_gradients: Callable
) -> None:
    ours, theirs = pair(kind, **config_of(kind, name))
    images = pixels(config_of(kind, name))
    found, wanted = ours(images), theirs(images)
    close(found.sample, wanted.sample)
    weights = torch.randn_like(wanted.sample)
    for output in (found, wanted):
        loss = (output.sample * weights).mean()
        (loss if output.commit_loss is None else loss + output.commit_loss).backward()
    if kind == "VQModel":
        close(found.commit_loss, wanted.commit_loss)
    same_gradients(ours, theirs)


@pytest.mark.parametrize("size", [(17, 23), (16, 15)])
def test_sizes_that_do_not_divide(size: tuple[int, int], pair: Callable) -> None:
    ours, theirs = pair("AutoencoderKL", **KL["deeper"])
    images = pixels(BASE, size)
    close(ours.encode(images).latent_dist.parameters, theirs.encode(images).latent_dist.parameters)
    close(ours(images).sample, theirs(images).sample)


def test_posterior_agrees_with_diffusers(pair: Callable) -> None:
    ours, theirs = pair("AutoencoderKL", **BASE)
    images = pixels(BASE)
    mine, other = ours.encode(images).latent_dist, theirs.encode(images, return_dict=False)[0]
    for name in ("mean", "logvar", "std", "var"):
        close(getattr(mine, name), getattr(other, name))
    close(mine.mode(), other.mode())
    close(mine.kl(), other.kl())
    target = torch.randn_like(mine.mean)
    close(mine.nll(target), other.nll(target))
    moved = torch.randn_like(mine.parameters)
    close(
        mine.kl(models.DiagonalGaussianDistribution(moved)),
        other.kl(diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moved)),
        tolerance=1e-4,
    )
    close(mine.sample(torch.Generator().manual_seed(3)), other.sample(torch.Generator().manual_seed(3)))
    one_by_one = [
        models.DiagonalGaussianDistribution(mine.parameters[i : i + 1]).sample(torch.Generator().manual_seed(3 + i))
        for i in range(2)
    ]
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    close(mine.sample(generators), torch.cat(one_by_one), tolerance=0)


def test_the_way_through_samples_the_posterior(pair: Callable) -> None:
    ours, theirs = pair("AutoencoderKL", **BASE)
    images = pixels(BASE)
    found, wanted = (
        m(images, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample for m in (ours, theirs)
    )
    close(found, wanted)
    assert (found - ours(images).sample).abs().max() > 1e-3
    close(ours(images, return_dict=False)[0], theirs(images, return_dict=False)[0])


@pytest.mark.parametrize(("kind", "losses"), [("AutoencoderKL", {"kl"}), ("VQModel", {"commitment", "codebook"})])
def test_one_trainer_trains_both(kind: str, losses: set[str]) -> None:
    """A few steps through nothing but the shared contract bring the losses down."""
    model = getattr(models, kind)(**BASE)
    images = pixels(BASE)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(8):
        output = model(images, sample_posterior=True, generator=torch.Generator().manual_seed(0))
        assert output.bottleneck.losses.keys() == losses
        assert not any(s.requires_grad for s in output.bottleneck.statistics.values())
        total = (output.sample - images).square().mean() + 1e-4 * sum(output.bottleneck.losses.values())
        optimizer.zero_grad()
        total.backward()
        assert model.decoder.conv_out.weight.grad is not None
        assert model.encoder.conv_in.weight.grad.abs().max() > 0
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.9 * totals[0]


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_the_parts_are_the_way_through(kind: str) -> None:
    model = getattr(models, kind)(**BASE)
    images = pixels(BASE)
    bottleneck = model.bottleneck(model.encode_moments(images), sample=False)
    output = model(images)
    assert torch.equal(model.decode_latents(bottleneck.latents), output.sample)
    assert torch.equal(bottleneck.latents, output.bottleneck.latents)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_slicing_changes_nothing(kind: str) -> None:
    model = getattr(models, kind)(**BASE)
    images = pixels(BASE)
    wanted = model(images).sample
    batches = []
    model.decoder.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    model.enable_slicing()
    close(model(images).sample, wanted)
    model.disable_slicing()
    model(images)
    assert batches == [1, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 56), (16, 50), (17, 16), (16, 16)])
def test_tiles_are_diffusers(size: tuple[int, int], pair: Callable) -> None:
    ours, theirs = pair("AutoencoderKL", **{**BASE, "sample_size": 16})
    images = torch.randn(2, 3, *size).clamp(-1, 1)
    plain = ours.encode(images).latent_dist.mean
    for model in (ours, theirs):
        model.enable_tiling()
    latents = ours.encode(images).latent_dist.mean
    close(latents, theirs.encode(images).latent_dist.mean)
    close(ours.decode(latents).sample, theirs.decode(latents).sample)
    assert torch.equal(latents, plain) == (size == (16, 16))
    ours.disable_tiling()
    assert torch.equal(ours.encode(images).latent_dist.mean, plain)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_a_network_that_sees_little_has_no_seams(kind: str) -> None:
    """Without attention and normalisation tiles differ only by what convolutions see at their rims."""
    model = getattr(models, kind)(**{**BASE, "mid_block_add_attention": False, "sample_size": 64})
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    latents = torch.randn(1, model.config.latent_channels, 64, 64)
    whole = model.decode_latents(latents)
    model.enable_tiling()
    tiled = model.decode_latents(latents)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.03 * whole.std()  # measured: 0.003 to 0.007 of it
    model.tile_overlap_factor = 0.0
    hard = model.decode_latents(latents)
    assert (hard - whole).abs().mean() > (tiled - whole).abs().mean()


def test_vq_decode_agrees_with_diffusers(pair: Callable) -> None:
    ours, theirs = pair("VQModel", **VQ["attention"], lookup_from_codebook=True)
    images = pixels(BASE)
    latents = ours.encode(images).latents
    close(latents, theirs.encode(images).latents)
    for name in ("sample", "commit_loss"):
        close(getattr(ours.decode(latents), name), getattr(theirs.decode(latents), name))
    indices = torch.randint(0, 32, (2, 8, 12))
    options = {"force_not_quantize": True, "shape": (2, 8, 12, 5)}
    close(ours.decode(indices, **options).sample, theirs.decode(indices, **options).sample)
    with pytest.raises(ValueError, match="indices need shape"):
        ours.decode(indices, force_not_quantize=True)

    ours, theirs = pair("VQModel", **VQ["attention"])
    found = ours.decode(latents, force_not_quantize=True, return_dict=False)
    for one, other in zip(found, theirs.decode(latents, force_not_quantize=True, return_dict=False), strict=True):
        close(one, other)
    assert found[1].shape == (2,)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_traces_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    model = getattr(models, kind)(**BASE)
    images = pixels(BASE)
    with torch.no_grad():
        close(torch.compile(model, backend="eager", fullgraph=True)(images).sample, model(images).sample)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_gradients(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    model = getattr(models, kind)(**ATTENTION)
    if kind == "VQModel":
        torch.nn.init.normal_(model.quantize.embedding.weight)
    images = pixels(BASE)
    found = torch.compile(model, backend=backend, fullgraph=True)(images).sample
    close(found, model(images).sample, tolerance=1e-4)
    latents = torch.randn(2, 4 if kind == "AutoencoderKL" else 3, 8, 12)
    decode = torch.compile(model.decode, backend=backend, fullgraph=True)
    close(decode(latents).sample, model.decode(latents).sample, tolerance=1e-4)
    found.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_gradient_checkpointing_changes_nothing(kind: str, same_gradients: Callable) -> None:
    plain, saving = (getattr(models, kind)(**BASE) for _ in range(2))
    saving.load_state_dict(plain.state_dict())
    saving.enable_gradient_checkpointing()
    calls = []
    saving.encoder.down_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    images = pixels(BASE)
    for model in (plain, saving):
        output = model(images)
        (output.sample.square().mean() + sum(output.bottleneck.losses.values())).backward()
    assert len(calls) == 2  # once more in the backward pass
    same_gradients(saving, plain)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_channels_last(kind: str, dtype: torch.dtype) -> None:
    model = getattr(models, kind)(**BASE).eval()
    images = pixels(BASE)
    with torch.no_grad():
        wanted = model(images).sample
        model = model.to(memory_format=torch.channels_last)
        model = model.half() if dtype == torch.float16 else model.bfloat16()
        output = model(images.to(dtype, memory_format=torch.channels_last))
    assert output.sample.dtype == dtype
    assert all(loss.dtype == torch.float32 for loss in output.bottleneck.losses.values()) or kind == "VQModel"
    if kind == "AutoencoderKL":  # a rounded vector may have another nearest code
        close(output.sample.float(), wanted, tolerance=0.05)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}])
def test_saved_by_one_loaded_by_the_other(kind: str, options: dict[str, Any], tmp_path: Path, pair: Callable) -> None:
    ours, theirs = pair(kind, **ATTENTION)
    variant = options.get("variant")
    if variant:
        ours.half(), theirs.half()
    ours.save_pretrained(tmp_path / "ours", **options)
    theirs.save_pretrained(tmp_path / "theirs", **options)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or "max_shard_size" not in options
    loading = {"torch_dtype": torch.float16, "variant": variant} if variant else {}
    in_ours = getattr(models, kind).from_pretrained(tmp_path / "theirs", **loading)
    in_theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "ours", **loading)
    for model in (in_ours, in_theirs):
        found = model.state_dict()
        assert found.keys() == theirs.state_dict().keys()
        assert all(torch.equal(found[name], weight) for name, weight in theirs.state_dict().items())
        keys = {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k[0] != "_"}
        assert keys == {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.config.items() if k[0] != "_"}
    if not variant:
        images = pixels(BASE)
        close(in_ours(images).sample, theirs.eval()(images).sample)
        close(in_theirs(images).sample, theirs(images).sample)


def test_loads_attention_names_from_before_2023(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = models.AutoencoderKL(**BASE).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old_names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, weight in load_file(path).items():
        for new, old in old_names.items():
            name = name.replace(new, old)
        weights[name] = weight
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    images = pixels(BASE)
    close(models.AutoencoderKL.from_pretrained(tmp_path)(images).sample, model(images).sample, tolerance=0)


def test_a_seed_gives_the_weights_that_diffusers_class_begins_with() -> None:
    """Of the encoder's convolutions: the encoder comes first, as there."""
    sides = [models.AutoencoderKL, diffusers.AutoencoderKL]
    weights = []
    for kind in sides:
        torch.manual_seed(0)
        weights.append(kind(block_out_channels=(8,), norm_num_groups=4).encoder.conv_in.weight)
    assert torch.equal(*weights)
