"""float16's scaler with two optimizers. Accelerate has one on a GPU only; torch's for the processor does the same."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from straight_line import Line, Points, settings
from torch import nn

from latentdiff.training.loop.learner import Learner
from latentdiff.training.objectives.objective import Objective, RealAndFake, Result

SCALE = 1024.0


class Watched(Line):
    """A line that shows its rival the points from the third pass on."""

    passes = 0

    def training_loss(self, batch: Points) -> Result:
        self.passes += 1
        shown = RealAndFake(batch.x, None) if self.passes > 2 else None
        return super().training_loss(batch)._replace(for_adversary=shown)


class Rival(Objective[RealAndFake]):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(2))

    def training_loss(self, batch: RealAndFake) -> Result:
        loss = (batch.real @ self.slope - batch.real[:, 0]).square().mean()
        return Result(loss, loss.detach(), {})


def learned(folder: Path, scaled: bool, overflow_at: int = -1) -> tuple[Learner, list[torch.Tensor]]:
    """A learner after eight updates, and the weights of both sides."""
    accelerator = Accelerator(cpu=True)
    if scaled:
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    given = settings(folder, optimizer="sgd", learning_rate=0.02, adam_beta1=0.0)
    try:
        learner = Learner(accelerator, given, Watched(), Rival(), 0.04, folder)
        for step in range(8):
            x = torch.randn(16, 2, generator=torch.Generator().manual_seed(step))
            learner.learn(Points(x * 250 if step == overflow_at else x), step)
    finally:
        accelerator.state._mixed_precision = "no"
    return learner, [learner.plain.slope.detach(), learner.adversary.plain.slope.detach()]  # type: ignore


def test_both_sides_learn_as_without_it(tmp_path: Path) -> None:
    learner, found = learned(tmp_path, scaled=True)
    _, wanted = learned(tmp_path, scaled=False)
    for mine, plain in zip(found, wanted, strict=True):
        assert plain.abs().max() > 0.05
        torch.testing.assert_close(mine, plain, atol=2e-3, rtol=0.02)
    assert learner.accelerator.scaler.get_scale() == SCALE
    assert learner.accelerator.scaler._get_growth_tracker() == 8  # once for each update


def test_an_overflow_leaves_one_update_out(tmp_path: Path) -> None:
    learner, found = learned(tmp_path, scaled=True, overflow_at=4)
    assert learner.accelerator.scaler.get_scale() == pytest.approx(SCALE / 2)
    assert all(weights.isfinite().all() for weights in found)
    assert learner.skipped == 0
