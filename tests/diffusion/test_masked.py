"""The loss where a mask is: the weighted mean of what the process's own loss is at each place."""

import pytest
import torch

from latentdiff.diffusion import GaussianDiffusion, RectifiedFlow
from latentdiff.diffusion.process import Process, per_picture

TIMES = torch.tensor([0, 400, 999])
KINDS: dict[str, tuple[Process, int]] = {
    "flow": (RectifiedFlow(2.0, weighting="cosmap"), 4),
    "simple": (GaussianDiffusion(prediction_type="v_prediction"), 4),
    "l1": (GaussianDiffusion(loss_type="l1"), 4),
    "hybrid": (GaussianDiffusion(variance_type="learned_range"), 8),
    "bound": (GaussianDiffusion(variance_type="learned_range", loss_type="bound"), 8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_over_the_mask(kind: str) -> None:
    process, channels = KINDS[kind]
    times = TIMES.float() if kind == "flow" else TIMES
    clean, noise = torch.randn(2, 3, 4, 2, 2).unbind()
    prediction, weight = torch.randn(3, channels, 2, 2), torch.tensor([1.0, 2.0, 3.0])
    mask = torch.tensor([[0.0, 0.25], [0.5, 1.0]]).expand(3, 1, 2, 2)

    def place(y: int, x: int) -> torch.Tensor:  # the loss of one place alone
        part = (..., slice(y, y + 1), slice(x, x + 1))
        return process.loss(prediction[part], clean[part], noise[part], times, weight)

    expected = (0.25 * place(0, 1) + 0.5 * place(1, 0) + place(1, 1)) / 1.75
    torch.testing.assert_close(process.loss(prediction, clean, noise, times, weight, mask), expected)
    whole = process.loss(prediction, clean, noise, times, weight)
    torch.testing.assert_close(process.loss(prediction, clean, noise, times, weight, mask=torch.ones_like(mask)), whole)

    prediction[:, :, 0, 0] = 7.0  # where nobody looks
    torch.testing.assert_close(process.loss(prediction, clean, noise, times, weight, mask), expected)
    wanted = (prediction[:, :4] - process.target(clean, noise, times)).square().mean(1)
    wanted = (0.25 * wanted[:, 0, 1] + 0.5 * wanted[:, 1, 0] + wanted[:, 1, 1]) / 1.75
    torch.testing.assert_close(process.error(prediction, clean, noise, times, mask), wanted.float())


def test_a_mask_without_white_gives_no_loss_and_no_gradient() -> None:
    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    mask = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    found = per_picture(x.square(), mask)
    assert found[0] == 0
    found.sum().backward()
    assert x.grad is not None
    assert (x.grad[0] == 0).all()
    torch.testing.assert_close(x.grad[1], x[1].detach() / 8)
