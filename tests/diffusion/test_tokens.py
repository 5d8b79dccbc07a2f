"""How codes are hidden, chosen and shown again."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_amused import mask_by_random_topk
from transformers import TopKLogitsWarper, TopPLogitsWarper

from latentdiff.diffusion.tokens import MaskedOrder, choose, hidden_after, probabilities, still_hidden


def test_as_many_are_hidden_as_the_cosine_says() -> None:
    noise, times = torch.randn(4, 1, 4, 4), torch.tensor([0.0, 0.3, 0.5, 1.0])
    hidden = MaskedOrder().hidden(noise, times)
    assert hidden.flatten(1).sum(1).tolist() == [1, 8, math.ceil(16 * 0.5**0.5), 16]
    assert noise[1][hidden[1]].min() > noise[1][~hidden[1]].max()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_filters_are_those_of_transformers(temperature: float) -> None:
    logits, ids = torch.randn(6, 20), torch.zeros(6, 1, dtype=torch.long)
    wanted = TopPLogitsWarper(0.7)(ids, TopKLogitsWarper(9)(ids, logits / temperature)).softmax(-1)
    torch.testing.assert_close(probabilities(logits, temperature, 9, 0.7), wanted)
    assert torch.equal(probabilities(logits, 0.0).argmax(-1), logits.argmax(-1))
    assert probabilities(logits, 0.0).max(-1).values.tolist() == [1.0] * 6


def test_codes_come_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0]).expand(20_000, -1)
    found = choose(shares, torch.rand(20_000)).bincount(minlength=6) / 20_000
    torch.testing.assert_close(found, shares[0], atol=0.02, rtol=0)
    ends = choose(shares[:2], torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [1, 4]  # never one of probability 0


def test_hidden_codes_come_to_an_end() -> None:
    left = first = torch.tensor([16, 3, 0])
    counts = []
    for step in range(8):
        left = hidden_after(step, 8, left, first)
        counts.append(left.tolist())
    assert [row[0] for row in counts] == [15, 14, 13, 11, 8, 6, 3, 0]
    assert [row[1] for row in counts] == [2, 1, 0, 0, 0, 0, 0, 0]  # one at least is shown, as long as there are any
    assert {row[2] for row in counts} == {0}


def test_the_surest_are_shown_first_as_in_diffusers() -> None:
    shares, hidden, left = torch.rand(3, 16), torch.rand(3, 16) < 0.7, torch.tensor([5, 1, 3])
    sureness = shares.masked_fill(~hidden, torch.finfo(shares.dtype).max)
    wanted = mask_by_random_topk(left[:, None], sureness, temperature=0.0)
    assert torch.equal(still_hidden(shares, hidden, left, torch.zeros(3, 16)), wanted)
    noise = torch.zeros(3, 16)
    noise[:, 3] = -100.0
    assert torch.equal(still_hidden(shares, hidden, left, noise)[:, 3], hidden[:, 3])
