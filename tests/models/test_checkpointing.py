"""Gradient checkpointing: the same gradients for less memory, also on several processes and beside adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from lives import forks, live
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from latentdiff.models import AutoencoderKL, UNet2DConditionModel, VQModel

UNET, CODER = small.UNET | {"dropout": 0.2}, small.CODER


def unet_and_inputs(size: int = 16) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET), (torch.randn(2, 4, size, size), torch.tensor([3, 900]), torch.randn(2, 5, 12))


def kl_and_inputs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return AutoencoderKL(**CODER), (torch.randn(2, 3, 32, 32),)


def vq_and_inputs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return VQModel(**CODER, num_vq_embeddings=16), (torch.randn(2, 3, 32, 32),)


def kept_bytes(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """What a forward pass leaves in memory for the backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        output = model(*inputs).sample
    output.sum().backward()
    return sum(event.self_cpu_memory_usage for event in record.key_averages())


@pytest.mark.parametrize("make", [unet_and_inputs, kl_and_inputs, vq_and_inputs])
def test_less_is_kept_for_the_backward_pass(make: Callable[[], Any]) -> None:
    model, inputs = make()
    model(*inputs)  # so that what is made once, such as buffers of the libraries, is there
    plain = kept_bytes(model, inputs)
    model.enable_gradient_checkpointing()
    saving = kept_bytes(model, inputs)
    assert plain > 1_000_000
    assert saving < 0.5 * plain


def test_dropout_is_drawn_alike_again() -> None:
    model, inputs = unet_and_inputs()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(1)
        model(*inputs).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_adapters_on_a_frozen_network_get_their_gradients(same_gradients: Callable[[Any, Any], None]) -> None:
    models = []
    for checkpointing in (False, True):
        model, inputs = unet_and_inputs()
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.eval()(*inputs).sample.square().mean().backward()
        models.append(model)
    same_gradients(models[1], models[0])


@pytest.mark.slow
@forks
@pytest.mark.parametrize("unused", [False, True])
def test_two_processes_get_the_gradients_of_one(unused: bool, tmp_path: Path) -> None:
    def work() -> None:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        model, inputs = unet_and_inputs()
        model.eval()  # no dropout, whose draws would differ
        model(*inputs).sample.square().mean().backward()
        alone = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.enable_gradient_checkpointing()
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
        wrapped(*(x[rank : rank + 1] for x in inputs)).sample.square().mean().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], alone, atol=1e-6, rtol=1e-4)

    log = tmp_path / "log.txt"
    live(work, log, processes=2)
