"""Optimizers and schedules: against their own code and diffusers', resumed exactly, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from straight_line import Line, Points, go, settings
from torch import nn

from latentdiff.training.loop.optimizers_and_schedules import Joined, build_optimizer, learning_rate_at
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.objectives.objective import Objective, Result
from latentdiff.training.settings import FinetuneSettings

OF_PACKAGES = {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}
EVERY = ["adamw", "adafactor", "sgd", "muon", *OF_PACKAGES]
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def needs(optimizer: str) -> None:
    if optimizer in OF_PACKAGES:
        pytest.importorskip(OF_PACKAGES[optimizer])


class Layers(Objective[Points]):
    """A convolution, an embedding, a linear layer and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.words = nn.Conv1d(1, 2, 3, padding=1), nn.Embedding(3, 4)
        self.linear, self.frozen = nn.Linear(4, 6), nn.Linear(6, 1).requires_grad_(False)

    def training_loss(self, batch: Points) -> Result:
        inside = self.conv(batch.x[:, None]).flatten(1) + self.words.weight[0]
        loss = (self.frozen(self.linear(inside).tanh()) - batch.x.sum(1, keepdim=True)).square().mean()
        return Result(loss, loss.detach(), {})


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_diffusers(tmp_path: Path, name: str) -> None:
    more: dict[str, Any] = {"cosine_with_restarts": {"lr_num_cycles": 3}, "polynomial": {"lr_power": 2.0}}.get(name, {})
    warmup = 0 if name == "constant" else 10
    plan = settings(tmp_path, lr_scheduler=name, **({"warmup_steps": warmup} if warmup else {}), **more)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    theirs = get_scheduler(
        name, optimizer, None, warmup, 40, num_cycles=more.get("lr_num_cycles", 1), power=more.get("lr_power", 1.0)
    )
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = [learning_rate_at(plan, step) for step in range(40)]
    assert ours[warmup:] == pytest.approx(rates[warmup:], rel=1e-6, abs=1e-12)
    assert ours[: max(warmup - 1, 0)] == pytest.approx(rates[1:warmup])  # ours has no first step of rate 0


@pytest.mark.parametrize("optimizer", EVERY)
def test_every_optimizer_learns_and_resumes_exactly(tmp_path: Path, optimizer: str) -> None:
    needs(optimizer)
    common = {"optimizer": optimizer, "lr_scheduler": "cosine", "warmup_steps": 2, "weight_decay": 0.01}
    common |= {} if optimizer == "prodigy" else {"learning_rate": 0.02}

    def trained(name: str, *stops: int) -> TrainingRun:
        for stop in stops:
            run = TrainingRun(settings(tmp_path / name, max_steps=12, checkpoint_every=stop, **common), Layers())
            for number in run.passes():
                if run.step >= stop:
                    break
                generator = torch.Generator().manual_seed(number)
                run.learn(Points(torch.randn(4, 2, generator=generator)))
            run.save(must=True)
        return run

    whole, parts = trained("a", 12), trained("b", 5, 12)
    assert whole.step == parts.step == 12
    with whole.averaged(), parts.averaged():
        for mine, other in zip(whole.objective.parameters(), parts.objective.parameters(), strict=True):
            assert torch.equal(mine, other)
    states = [run.learner.optimizer.state_dict()["param_groups"] for run in (whole, parts)]
    assert states[0] == states[1]


def test_muon_is_for_the_matrices_of_linear_layers(tmp_path: Path) -> None:
    module = Layers()
    optimizer = build_optimizer(settings(tmp_path, optimizer="muon", weight_decay=0.1), module)
    assert isinstance(optimizer, Joined)
    muon, adamw = optimizer.parts
    assert [list(part.param_groups[0]["params"]) for part in (muon, adamw)] == [
        [module.linear.weight],
        [module.conv.weight, module.conv.bias, module.words.weight, module.linear.bias],
    ]
    peer = Layers()
    rest = [p for p in peer.parameters() if p.requires_grad and p is not peer.linear.weight]
    alone = [
        torch.optim.Muon([peer.linear.weight], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99)),
    ]
    for part in (module, peer):
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, 0.1).cumsum(0)
    for one in (optimizer, *alone):
        one.step()
    for mine, other in zip(module.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_one_kind_of_parameter_is_enough_for_muon(tmp_path: Path) -> None:
    for module in (nn.Conv1d(1, 2, 3), nn.Linear(2, 2, bias=False)):
        optimizer = build_optimizer(settings(tmp_path, optimizer="muon"), module)
        assert len(optimizer.parts) == 1
    with pytest.raises(ValueError, match="there is nothing to train"):
        build_optimizer(settings(tmp_path, optimizer="muon"), nn.Linear(2, 2).requires_grad_(False))


def test_the_average_of_schedulefree_is_its_own(tmp_path: Path) -> None:
    """What is drawn with is what the package's ``eval`` gives; training goes on from the very same weights."""
    schedulefree = pytest.importorskip("schedulefree")
    run = go(TrainingRun(settings(tmp_path, optimizer="schedulefree", max_steps=10), Line()))
    y = run.objective.slope.detach().clone()
    peer = Line()
    theirs = schedulefree.AdamWScheduleFree([peer.slope], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    theirs.train()
    for number in range(10):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(number))
        peer.training_loss(Points(x)).loss.backward()
        nn.utils.clip_grad_norm_([peer.slope], 1.0)
        theirs.step()
        theirs.zero_grad()
    theirs.eval()
    run.end_training()  # which forgets the optimizer's state, before the model is saved
    with run.averaged():
        torch.testing.assert_close(run.objective.slope, peer.slope)
        assert not torch.equal(run.objective.slope, y)
    assert torch.equal(run.objective.slope, y)


def test_prodigy_begins_at_a_rate_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings(tmp_path, optimizer="prodigy", learning_rate=0.5).learning_rate == 0.5
    values = {"data": "-", "output": str(tmp_path), "optimizer": "prodigy"}
    for method in ("lora", "full"):
        assert FinetuneSettings.load(None, {**values, "method": method}).learning_rate == 1.0
    needs("prodigy")
    build_optimizer(settings(tmp_path, optimizer="prodigy", weight_decay=0.1), Line())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("optimizer", list(OF_PACKAGES))
def test_a_package_that_is_missing_is_named(tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, OF_PACKAGES[optimizer], None)
    with pytest.raises(ValueError, match=f"optimizer={optimizer} needs {OF_PACKAGES[optimizer]}: pip install"):
        build_optimizer(settings(tmp_path, optimizer=optimizer), Line())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler": "cosine", "decay_steps": 5}, "lr_scheduler=cosine is in place of decay_steps"),
        ({"lr_scheduler": "cosine", "lr_power": 2.0}, "lr_power is for lr_scheduler=polynomial"),
        ({"lr_num_cycles": 2}, "lr_num_cycles is for lr_scheduler=cosine_with_restarts"),
        ({"lr_scheduler": "step"}, "lr_scheduler"),
        ({"optimizer": "schedulefree", "ema_decay": 0.9}, "ema_decay is not for optimizer=schedulefree"),
        ({"optimizer": "schedulefree", "adam_beta1": 0.0}, "needs an adam_beta1 above 0"),
    ],
)
def test_what_does_nothing_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)
