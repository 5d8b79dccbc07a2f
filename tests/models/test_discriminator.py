"""The judge of patches and the losses on both sides, against closed forms."""

import pytest
import torch

from latentdiff.models.discriminator import PatchDiscriminator, adversarial_loss, discriminator_loss, gradient_penalty


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_patch_is_seventy_pixels_wide(norm: str) -> None:
    discriminator = PatchDiscriminator(channels=8, norm=norm).eval()  # in training a batch's norm sees everything
    if norm == "group":  # ... and a group's norm does always
        for module in discriminator.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
    pixels = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = discriminator(pixels)
    assert logits.shape == (1, 1, 30, 30)
    (seen,) = torch.autograd.grad(logits[0, 0, 15, 15], pixels)
    rows = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_its_weights_have_vqgans_names() -> None:
    names = PatchDiscriminator(layers=2).state_dict().keys()
    assert {"main.0.weight", "main.2.weight", "main.3.running_mean", "main.6.num_batches_tracked"} <= names
    assert {"main.8.weight", "main.8.bias"} <= names
    assert "main.2.bias" not in names


def test_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 2) / 2))
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    vanilla = 0.5 * (bce(real, torch.ones(2)) + bce(fake, torch.zeros(2)))
    torch.testing.assert_close(discriminator_loss(real, fake, "vanilla"), vanilla)
    assert adversarial_loss(fake).item() == pytest.approx(1.0)


def test_the_penalty_is_the_squared_slope() -> None:
    slope = torch.randn(3, 8, 8)
    pixels = torch.randn(4, 3, 8, 8, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    logits = (scale * slope * pixels).sum((1, 2, 3)).view(4, 1, 1, 1)
    penalty = gradient_penalty(logits, pixels)
    torch.testing.assert_close(penalty, 4 * slope.square().sum())
    (through,) = torch.autograd.grad(penalty, scale)
    torch.testing.assert_close(through, 4 * slope.square().sum())


def test_who_is_judged_gets_the_gradient_and_the_judge_none() -> None:
    discriminator = PatchDiscriminator(channels=4, layers=1)
    pixels = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = discriminator.judge(pixels)
    torch.testing.assert_close(logits, discriminator(pixels))
    logits.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
