"""Batches as wholes."""

import torch

from latentdiff.conditioning import Conditioning
from latentdiff.training.batch.batch_types import SampleBatch, Tokens

HERE = torch.zeros(2, 4)


def test_what_is_within_a_batch_moves_with_it() -> None:
    """So that pinned memory, from which a GPU copies without waiting, has the conditions too."""
    tokens = Tokens(torch.ones(2, 5, dtype=torch.long), None)
    for captions in (Conditioning(states=HERE), tokens):
        batch = SampleBatch(HERE, captions, HERE, HERE, HERE, HERE, ("a", "b")).to(torch.device("meta"))
        moved = batch.captions.states if isinstance(batch.captions, Conditioning) else batch.captions.input_ids
        assert moved is not None
        assert batch.noise.device.type == moved.device.type == "meta"
        assert batch.names == ("a", "b")
