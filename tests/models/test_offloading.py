"""Weights that are elsewhere, or in another precision, until they are needed: Accelerate's and diffusers' ways.

On the CPU a weight that was not fetched shows where offloading leaves nothing behind: on the meta device, or on disk.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import small
import torch
from torch import Tensor, nn

from latentdiff.models import AutoencoderKL, UNet2DConditionModel, VQModel

UNET = small.UNET | {"num_class_embeds": 3}
SDXL = small.UNET | {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
SDXL |= {"projection_class_embeddings_input_dim": 8 + 6 * 4}
CODER = small.CODER | {"latent_channels": 4}
CPU = torch.device("cpu")


def sequentially(model: Any, folder: Path) -> None:
    accelerate.cpu_offload(model, CPU)


def to_disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, folder, CPU)


def in_groups(level: str) -> Callable[[Any, Path], None]:
    def offload(model: Any, folder: Path) -> None:
        model.enable_group_offload(
            CPU, offload_type=f"{level}_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
        )

    return offload


def in_half(model: Any, folder: Path) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


WAYS = {"sequential": sequentially, "disk": to_disk, "blocks": in_groups("block"), "leaves": in_groups("leaf")}


def make(kind: type[nn.Module], config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = kind(**config).eval()
    if kind is VQModel:
        nn.init.normal_(model.quantize.embedding.weight)
    return model


def unet_call(unet: Any) -> Tensor:
    torch.manual_seed(1)
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    return unet(sample, torch.tensor([3, 900]), states, class_labels=torch.tensor([2, 0])).sample


def sdxl_call(unet: Any) -> Tensor:
    torch.manual_seed(1)
    sample, states, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 8)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)}
    return unet(sample, torch.tensor([3, 900]), states, added_cond_kwargs=added).sample


def unet_in_parts(unet: Any) -> Tensor:
    torch.manual_seed(1)
    sample, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    time = unet.embed_time(torch.tensor([3, 900]), class_labels=torch.tensor([2, 0]))
    return unet.denoise(sample, time, unet.encode_text(states))


def encoded(model: Any) -> Tensor:
    torch.manual_seed(1)
    found = model.encode(torch.rand(1, 3, 16, 16))
    return found.latents if isinstance(model, VQModel) else found.latent_dist.mean


def decoded(model: Any) -> Tensor:
    torch.manual_seed(1)
    return model.decode(torch.randn(1, 4, 8, 8)).sample


def there_and_back(model: Any) -> Tensor:
    torch.manual_seed(1)
    return model(torch.rand(1, 3, 16, 16)).sample


CALLS = [
    (UNet2DConditionModel, UNET, unet_call),
    (UNet2DConditionModel, SDXL, sdxl_call),
    *((kind, CODER, call) for kind in (AutoencoderKL, VQModel) for call in (encoded, decoded, there_and_back)),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "config", "call"), CALLS)
@torch.no_grad()
def test_weights_come_when_they_are_needed(
    kind: Any, config: dict[str, Any], call: Callable[[Any], Tensor], way: str, tmp_path: Path
) -> None:
    wanted = call(make(kind, config))
    model = make(kind, config)
    WAYS[way](model, tmp_path)
    for _ in range(2):
        torch.testing.assert_close(call(model), wanted)


@pytest.mark.parametrize("way", ["sequential", "disk"])
@torch.no_grad()
def test_a_unet_in_parts(way: str, tmp_path: Path) -> None:
    wanted = unet_call(make(UNet2DConditionModel, UNET))
    unet = make(UNet2DConditionModel, UNET)
    assert unet.works_in_parts
    WAYS[way](unet, tmp_path)
    assert unet.works_in_parts
    torch.testing.assert_close(unet_in_parts(unet), wanted)


def test_a_unet_in_groups_is_not_called_in_parts(tmp_path: Path) -> None:
    unet = make(UNet2DConditionModel, UNET)
    WAYS["blocks"](unet, tmp_path)
    assert not unet.works_in_parts
    with pytest.raises(ValueError, match="with group offloading only plain calls are possible"):
        unet.encode_text(torch.randn(1, 5, 12))


@pytest.mark.parametrize(("kind", "config", "call"), [*CALLS, (UNet2DConditionModel, UNET, unet_in_parts)])
@torch.no_grad()
def test_weights_kept_in_half_precision(
    kind: Any, config: dict[str, Any], call: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    model = make(kind, config)
    wanted = call(model)
    in_half(model, tmp_path)
    kept = {parameter.dtype for parameter in model.parameters()}
    assert torch.float16 in kept
    assert model.dtype == torch.float32
    found = call(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
    assert not torch.equal(found, wanted)
