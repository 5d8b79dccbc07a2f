"""The classifier of noisy pictures; against the released code in tests/interchange/single_file/test_adm.py."""

from typing import Any

import pytest
import torch

from latentdiff.models import NoisyClassifier

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "num_classes": 5,
    "block_out_channels": (16, 24, 32),
    "norm_num_groups": 8,
    "attn_norm_num_groups": 8,
    "attention_head_dim": 8,
}


def test_the_gradient_is_that_of_the_log_probability() -> None:
    torch.manual_seed(0)
    model = NoisyClassifier(**SMALL).double()
    torch.nn.init.normal_(model.head.to_out.weight)
    x, labels, step = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 4]), 1e-5
    with torch.no_grad():
        gradient = model.log_probability_gradient(x, 300, labels)
        assert not gradient.requires_grad
        for place in ((0, 0, 3, 5), (1, 2, 15, 0)):
            moved = x.clone()
            moved[place] += step
            change = [model(one, 300).log_softmax(-1)[place[0], labels[place[0]]] for one in (x, moved)]
            wanted = float((change[1] - change[0]) / step)
            assert float(gradient[place]) == pytest.approx(wanted, rel=1e-3)


def test_it_learns_to_tell() -> None:
    """Dark from light, at any noise below one half."""
    torch.manual_seed(0)
    model = NoisyClassifier(**SMALL | {"num_classes": 2, "pool": "adaptive", "block_out_channels": (16, 16)} | TWO)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(120):
        labels = torch.randint(0, 2, (16,))
        x = (labels * 2.0 - 1).view(-1, 1, 1, 1) + 0.5 * torch.randn(16, 3, 8, 8)
        loss = torch.nn.functional.cross_entropy(model(x, torch.randint(0, 500, (16,))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


TWO: dict[str, Any] = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}


def test_what_does_not_fit_is_refused() -> None:
    model = NoisyClassifier(**SMALL)
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\), and this is \(1, 4, 16, 16\)"):
        model(torch.zeros(1, 4, 16, 16), 0)
    with pytest.raises(ValueError, match="takes 16x16 and this is 24x8"):
        model(torch.zeros(1, 3, 8, 24), 0)
    assert NoisyClassifier(**SMALL, pool="adaptive")(torch.zeros(1, 3, 8, 24), 0).shape == (1, 5)
    for changes, message in (
        ({"num_classes": 0}, "num_classes=0"),
        ({"pool": "spatial"}, "pool='spatial'"),
        ({"sample_size": 18}, "sample_size=18 is not a multiple of"),
        ({"attention_head_dim": 7}, "attention_head_dim=7"),
        ({"up_block_types": ("UpBlock2D",)}, "unknown config key 'up_block_types'"),
    ):
        with pytest.raises(ValueError, match=message):
            NoisyClassifier(**SMALL | changes)
