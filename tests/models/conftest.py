"""Pairs of models, ours and diffusers', with the same weights."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from latentdiff import models

Pair = Callable[..., tuple[Any, Any]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def pair() -> Pair:
    def make(name: str, **config: Any) -> tuple[Any, Any]:
        theirs = getattr(diffusers, name)(**config)
        if name == "VQModel":  # codes as far apart as the vectors are, so that rounding cannot change the nearest
            torch.nn.init.normal_(theirs.quantize.embedding.weight)
        ours = getattr(models, name)(**config)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    return make


@pytest.fixture
def same_gradients() -> Callable[[Any, Any], None]:
    """Compares the gradients of parameters of the same name, each against the largest of the whole model."""

    def check(ours: Any, theirs: Any) -> None:
        found = {name: p.grad for name, p in ours.named_parameters()}
        wanted = {name: p.grad for name, p in theirs.named_parameters()}
        assert found.keys() == wanted.keys()
        assert {n for n, g in found.items() if g is None} == {n for n, g in wanted.items() if g is None}
        scale = max(float(g.abs().max()) for g in wanted.values() if g is not None)
        assert scale > 0
        for name, gradient in wanted.items():
            if gradient is not None:
                close = torch.isclose(found[name], gradient, atol=1e-5 * max(scale, 1.0), rtol=1e-5)
                assert close.all(), f"{name}: {(found[name] - gradient).abs().max()} apart"

    return check
