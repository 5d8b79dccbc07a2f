"""Tiles and slices: equal to diffusers' at equal settings, near the whole picture, in bounded memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from latentdiff import models
from latentdiff.interchange.folders import packaged_model
from latentdiff.models.tiling import blended, in_tiles

SMALL: dict[str, Any] = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "sample_size": 64,
}
KINDS = ["AutoencoderKL", "VQModel"]


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("size", [(200, 136), (130, 97), (64, 200), (72, 65)])
def test_tiles_are_diffusers(size: tuple[int, int], overlap: float, pair: Callable) -> None:
    ours, theirs = pair("AutoencoderKL", **SMALL)
    images = noise(1, 3, *size)
    for model in (ours, theirs):
        model.enable_tiling()
        model.tile_overlap_factor = overlap
    latents = ours.encode(images).latent_dist.parameters
    assert latents.shape == (1, 8, size[0] // 4, size[1] // 4)
    if all(rest(side, 64, overlap) == 0 or rest(side, 64, overlap) >= 4 for side in size):  # it has no such tiles
        torch.testing.assert_close(latents, theirs.encode(images).latent_dist.parameters, atol=1e-5, rtol=1e-5)
    pixels = ours.decode(latents[:, :4]).sample
    torch.testing.assert_close(pixels, theirs.decode(latents[:, :4]).sample, atol=1e-5, rtol=1e-5)


def rest(side: int, tile: int, overlap: float) -> int:
    """Pixels of the last tile."""
    return side % int(tile * (1 - overlap))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.3, 0.99])
def test_any_overlap_and_any_tile_give_the_whole_size(kind: str, overlap: float) -> None:
    model = getattr(models, kind)(**SMALL).requires_grad_(False)
    model.enable_tiling(tile_sample_min_size=22, tile_overlap_factor=overlap)  # 20: five latents
    assert (model.tile_sample_min_size, model.tile_latent_min_size) == (20, 5)
    images = noise(1, 3, 29, 34)
    whole = getattr(models, kind)(**SMALL).encode_moments(images)
    latents = model.encode_moments(images)
    assert latents.shape == whole.shape
    assert latents.isfinite().all()
    output = model(images).sample
    assert output.shape == (1, 3, 28, 32)
    assert output.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("size", [(16, 16), (17, 40), (64, 3), (31, 33)])
def test_what_knows_no_whole_is_exact_in_tiles(size: tuple[int, int], overlap: float) -> None:
    """Places that are each made from their own pixels only come out as from the whole picture, wherever the tiles."""
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(in_tiles(torch.tanh, x, 16, 16, overlap), torch.tanh(x))
    coarse, fine = (lambda x: F.max_pool2d(x, 4)), (lambda x: F.interpolate(x, scale_factor=4.0))
    torch.testing.assert_close(in_tiles(fine, x, 8, 32, overlap), fine(x))
    if min(size) >= 4:
        torch.testing.assert_close(in_tiles(coarse, x, 32, 8, overlap), coarse(x))


def test_tiles_come_in_linearly() -> None:
    """A tile of zeros, then a tile of ones: the overlap is a ramp."""
    values = iter((0.0, 1.0, 1.0))
    out = in_tiles(lambda x: torch.full_like(x, next(values)), torch.zeros(1, 1, 1, 12), 8, 8, 0.5)
    assert out.flatten().tolist() == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    before, after = torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 5, 1)
    assert blended(before, after, 4, dim=2).flatten().tolist() == [0, 0.5, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_up_to_a_tile_nothing_is_tiled(kind: str) -> None:
    model = getattr(models, kind)(**SMALL)
    images = noise(1, 3, 64, 48)
    whole = model(images).sample
    model.enable_tiling()
    assert torch.equal(model(images).sample, whole)
    assert not torch.equal(model(noise(1, 3, 64, 68)).sample[..., :48], whole)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_of_a_batch_in_tiles(kind: str) -> None:
    model = getattr(models, kind)(**SMALL)
    model.enable_tiling(tile_sample_min_size=32)
    images = noise(3, 3, 72, 40)
    batches: list[int] = []
    model.decoder.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    together = model(images).sample
    assert set(batches) == {3}
    batches.clear()
    model.enable_slicing()
    torch.testing.assert_close(model(images).sample, together, atol=1e-5, rtol=1e-5)
    assert set(batches) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_tiles_and_slices(kind: str) -> None:
    """As if the tiles that the decoder made had been put together by hand: here they only lie side by side."""
    model = getattr(models, kind)(**SMALL).double()
    latents = torch.randn(2, model.config.latent_channels, 16, 32, dtype=torch.float64, requires_grad=True)
    halves = torch.cat([model.decode_latents(half) for half in latents.split(16, dim=3)], dim=3)
    weights = torch.randn_like(halves)
    (wanted,) = torch.autograd.grad((halves * weights).sum(), latents)
    model.enable_tiling(tile_overlap_factor=0.0)
    model.enable_slicing()
    (found,) = torch.autograd.grad((model.decode_latents(latents) * weights).sum(), latents)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_in_bfloat16(kind: str) -> None:
    model = getattr(models, kind)(**SMALL)
    latents = torch.randn(1, model.config.latent_channels, 24, 40)
    for shared in (False, True):
        model.float().enable_tiling(tile_sample_min_size=48, tile_shared_norms=shared)
        wanted = model.decode_latents(latents)
        found = model.bfloat16().decode_latents(latents.bfloat16())
        assert found.dtype == torch.bfloat16
        assert (found - wanted).abs().mean() < 0.03 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_tiles_trace_as_one_graph(kind: str, shared: bool) -> None:
    torch._dynamo.reset()
    model = getattr(models, kind)(**SMALL)
    model.enable_tiling(tile_sample_min_size=32, tile_shared_norms=shared)
    images = noise(1, 3, 40, 48)
    found = torch.compile(model, backend="eager", fullgraph=True)(images).sample
    torch.testing.assert_close(found, model(images).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_settings_without_tiles_are_refused() -> None:
    model = models.AutoencoderKL(**SMALL)
    for overlap in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match="tile_overlap_factor must be from 0 to below 1"):
            model.enable_tiling(tile_overlap_factor=overlap)
    model.tile_overlap_factor = 0.25
    for tile in (0, 3, -8):
        with pytest.raises(ValueError, match=f"tile_sample_min_size={tile} is too small"):
            model.enable_tiling(tile_sample_min_size=tile)
    model.enable_tiling(tile_sample_min_size=48)
    model.tile_sample_min_size = 32  # and not the latents'
    for call in (lambda: model.encode(noise(1, 3, 96, 96)), lambda: model.decode(noise(1, 4, 24, 24))):
        with pytest.raises(ValueError, match=r"tile_sample_min_size=32 and tile_latent_min_size=12 .* to 32 and 8"):
            call()
    model.tile_latent_min_size = 8
    assert model.decode(noise(1, 4, 24, 24)).sample.shape == (1, 3, 96, 96)


@torch.no_grad()
def test_shared_norms_are_of_the_whole_picture() -> None:
    norm = nn.GroupNorm(2, 6, eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 24, 16) * torch.linspace(0.1, 3, 24)[:, None] + 5
    whole, tiles = norm(x), (8, 8, 0.0)
    assert (in_tiles(norm, x, *tiles) - whole).abs().max() > 0.5
    torch.testing.assert_close(in_tiles(norm, x, *tiles, shared_norms=True), whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="without gradients"), torch.enable_grad():
        in_tiles(norm, x, *tiles, shared_norms=True)


def drawing(side: int) -> Tensor:
    """(1, 3, side, side) in [-1, 1]: discs and boxes of many sizes and colours on white."""
    generator = torch.Generator().manual_seed(0)
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for i in range(side * side // 1500):
        x, y, extent, *colour = (torch.rand(6, generator=generator) * 256).int().tolist()
        left, top, right = x * side // 256, y * side // 256, 6 + extent // 8
        (draw.ellipse if i % 2 else draw.rectangle)((left, top, left + right, top + right), tuple(colour))
    return pil_to_tensor(image)[None] / 127.5 - 1


@torch.no_grad()
def test_seams_of_the_packaged_model() -> None:
    """The figures are measured here; the limits lie a third above them."""
    model = models.AutoencoderKL.from_pretrained(packaged_model(), subfolder="vae").eval()
    pixels = drawing(256)
    latents = model.encode_moments(pixels)[:, : model.config.latent_channels]
    whole = model.decode_latents(latents)

    def errors(**options: Any) -> tuple[float, float]:
        """Of encoding and decoding, relative to the spread of the whole."""
        model.enable_tiling(**options)
        found = model.encode_moments(pixels)[:, : model.config.latent_channels], model.decode_latents(latents)
        wanted = latents, whole
        first, second = (float((a - b).square().mean().sqrt() / b.std()) for a, b in zip(found, wanted, strict=True))
        return first, second

    def check(encoding: float, decoding: float, **options: Any) -> None:
        found = errors(**options)
        assert 0 < found[0] < 4 / 3 * encoding
        assert 0 < found[1] < 4 / 3 * decoding

    check(0.185, 0.163, tile_sample_min_size=64)
    check(0.096, 0.073, tile_sample_min_size=128)
    check(0.157, 0.138, tile_overlap_factor=0.0)
    check(0.074, 0.059, tile_overlap_factor=0.5)
    check(0.077, 0.056, tile_overlap_factor=0.25, tile_shared_norms=True)
