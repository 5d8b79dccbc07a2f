"""The contract of denoisers: parts called by themselves are the plain call."""

from typing import Any

import pytest
import small
import torch

from latentdiff.conditioning import Conditioning
from latentdiff.models import TextContext, UNet2DConditionModel, UNet2DModel
from latentdiff.models.network import Denoiser

PLAIN: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_class_embeds": 5,
}


def with_text() -> tuple[Denoiser[TextContext], Conditioning]:
    conditioning = Conditioning(
        states=torch.randn(2, 5, 12), mask=torch.tensor([[1, 1, 0, 0, 0], [1] * 5]), labels=torch.tensor([4, 0])
    )
    return UNet2DConditionModel(**small.UNET, num_class_embeds=5).eval(), conditioning


def without_text() -> tuple[Denoiser[TextContext], Conditioning]:
    return UNet2DModel(**PLAIN).eval(), Conditioning(labels=torch.tensor([4, 0]))


@pytest.mark.parametrize("make", [with_text, without_text])
@torch.no_grad()
def test_parts_are_the_plain_call(make: Any) -> None:
    torch.manual_seed(0)
    network, conditioning = make()
    sample = torch.randn(2, 4, 8, 8)
    prepared = network.prepare(conditioning)
    for timestep in (3, 900):
        wanted = network(sample, timestep, **conditioning.arguments()).sample
        time = network.embed_time(timestep, class_labels=conditioning.labels)
        assert torch.equal(network.denoise(sample, time, prepared), wanted)
        second = network.embed_time(timestep, class_labels=conditioning.labels[1:])
        one = network.denoise(sample[1:], second, prepared.select(slice(1, None)))
        torch.testing.assert_close(one, wanted[1:], atol=1e-5, rtol=1e-5)
    assert network.downscale_factor == 2
    assert network.works_in_parts


def test_what_was_prepared_depends_on_the_modules_that_are_named() -> None:
    network, conditioning = with_text()
    before = network.prepare(conditioning)
    assert network.prepared_by()
    with torch.no_grad():
        for module in network.prepared_by():
            for weight in module.parameters():
                weight.add_(1)
    after = network.prepare(conditioning)
    for (keys, values), (k, v) in zip(before.keys_values, after.keys_values, strict=True):
        assert (keys - k).abs().min() > 0
        assert (values - v).abs().min() > 0
    assert list(without_text()[0].prepared_by()) == []


def test_conditions_that_a_network_does_not_take_are_refused() -> None:
    unet, conditioning = with_text()
    with pytest.raises(ValueError, match="a pooled embedding is not supported, but was given"):
        unet.prepare(conditioning.replace(pooled=torch.randn(2, 7)))
    with pytest.raises(ValueError, match="the conditioning has no text states"):
        unet.prepare(Conditioning())
    plain, _ = without_text()
    with pytest.raises(ValueError, match="UNet2DModel: it takes no states, no mask"):
        plain.prepare(conditioning)


def test_a_compiled_network_is_called_as_a_whole() -> None:
    unet, conditioning = with_text()
    unet.compile(backend="eager")  # type: ignore[attr-defined]
    assert not unet.works_in_parts
    with pytest.raises(ValueError, match=r"so after unet.compile\(\)"):
        unet.prepare(conditioning)
