"""Layers that are made otherwise than they are written down: doubling and convolution in one, activation in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from latentdiff.models.layers import Upsample2D, can_fuse, doubling_kernel, norm_silu


def in_two(layer: Upsample2D, x: Tensor) -> Tensor:
    return layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3), (16, 16)])
def test_doubling_and_convolution_can_fuse(size: tuple[int, int]) -> None:
    layer = Upsample2D(6).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    kernel = doubling_kernel(layer.conv.weight)
    found = F.conv_transpose2d(x, kernel, layer.conv.bias, stride=2, padding=1)
    wanted = in_two(layer, x)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    weights = torch.randn_like(wanted)
    inputs = [x, *layer.parameters()]
    one, other = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, wanted))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_it_is_taken_in_float32_and_to_the_double_only() -> None:
    layer, x = Upsample2D(4), torch.randn(1, 4, 5, 5)
    assert can_fuse(layer.conv, x)
    torch.testing.assert_close(layer(x), in_two(layer, x), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fuse(layer.conv, x)
        assert torch.equal(layer(x), in_two(layer, x))
    torch.testing.assert_close(layer(x, (10, 10)), in_two(layer, x), atol=1e-5, rtol=1e-5)
    other = layer(x, torch.Size((9, 10)))
    assert torch.equal(other, layer.conv(F.interpolate(x, size=(9, 10), mode="nearest")))
    layer.bfloat16()
    assert not can_fuse(layer.conv, x.bfloat16())
    assert torch.equal(layer(x.bfloat16()), in_two(layer, x.bfloat16()))


def with_lora(layer: Upsample2D) -> Any:
    model = get_peft_model(layer, LoraConfig(target_modules=["conv"], r=2, init_lora_weights=False))
    return model.base_model.model


def with_hook(layer: Upsample2D) -> Any:
    layer.conv.register_forward_hook(lambda _module, _inputs, output: output * 2)
    return layer


def with_other_forward(layer: Upsample2D) -> Any:
    forward = layer.conv.forward
    layer.conv.forward = lambda x: forward(x) - 1  # as accelerate's and diffusers' hooks do
    return layer


@pytest.mark.parametrize("change", [with_lora, with_hook, with_other_forward])
def test_what_is_done_to_the_convolution_counts(change: Callable[[Upsample2D], Any]) -> None:
    layer, x = Upsample2D(4), torch.randn(1, 4, 5, 5)
    before = layer(x)
    changed = change(layer)
    assert torch.equal(changed(x), in_two(changed, x))
    assert (changed(x) - before).abs().max() > 0.01


def test_activation_in_place_leaves_its_input_alone() -> None:
    for norm in (nn.GroupNorm(2, 4), nn.Identity()):
        x = torch.randn(1, 4, 3, 3)
        before = x.clone()
        with torch.no_grad():
            found = norm_silu(norm, x)
        assert torch.equal(x, before)
        torch.testing.assert_close(found, F.silu(norm(x)))
        assert norm_silu(norm, x.requires_grad_()).requires_grad
