import pytest
import torch

from latentdiff.diffusion.guidance import ClassifierFreeGuidance


def test_equation_of_the_paper() -> None:
    without, with_prompt = torch.tensor([[[[1.0]]]]), torch.tensor([[[[3.0]]]])
    w = 4.0  # Ho & Salimans 2022, Eq. 6: (1 + w) eps(z, c) - w eps(z)
    guided = ClassifierFreeGuidance(scale=1 + w)(without, with_prompt)
    torch.testing.assert_close(guided, (1 + w) * with_prompt - w * without)


def test_full_rescale_restores_the_conditional_standard_deviation() -> None:
    torch.manual_seed(0)
    without, with_prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    guided = ClassifierFreeGuidance(8.0, rescale=1.0)(without, with_prompt)
    torch.testing.assert_close(guided.std(dim=(1, 2, 3)), with_prompt.std(dim=(1, 2, 3)))
    half = ClassifierFreeGuidance(8.0, rescale=0.5)(without, with_prompt)
    torch.testing.assert_close(half, (guided + ClassifierFreeGuidance(8.0)(without, with_prompt)) / 2)


@pytest.mark.parametrize(("scale", "active"), [(0.0, False), (1.0, False), (1.01, True), (7.5, True)])
def test_no_second_prediction_up_to_one(scale: float, active: bool) -> None:
    assert ClassifierFreeGuidance(scale).active is active
