"""What conditions a network: batches joined, split, repeated and moved as one."""

import pytest
import torch
from tiny import bert_parts, clip_parts

from latentdiff.conditioning import ClassConditioner, Conditioning, GuidedConditioning, NoConditioner
from latentdiff.text.encode import TextConditioner


def full(count: int, value: float = 1.0) -> Conditioning:
    return Conditioning(
        states=torch.full((count, 5, 3), value),
        mask=torch.ones(count, 5, dtype=torch.bool),
        pooled=torch.full((count, 4), value),
        time_ids=torch.full((count, 6), value),
        labels=torch.arange(count),
        guidance=torch.full((count, 2), value),
        channels=torch.full((count, 3, 2, 2), value),
    )


def test_all_fields_are_taken_along() -> None:
    whole = Conditioning.cat([full(2, 1.0), full(3, 2.0)])
    assert whole.batch_size == 5
    assert len(whole.items()) == 7
    assert [len(tensor) for _, tensor in whole.items()] == [5] * 7
    assert whole.select(slice(2, None)).states.unique().tolist() == [2.0]  # type: ignore[union-attr]
    assert whole.select(torch.tensor([True, False, False, False, True])).labels.tolist() == [0, 2]  # type: ignore[union-attr]
    assert full(2).repeat(2).labels.tolist() == [0, 0, 1, 1]  # type: ignore[union-attr]
    assert full(2).replace(labels=None).labels is None


def test_precision_is_of_floating_point_alone() -> None:
    half = full(2).to("cpu", torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in half.items()}
    assert (kinds.pop("mask"), kinds.pop("labels")) == (torch.bool, torch.int64)
    assert set(kinds.values()) == {torch.bfloat16}
    assert all(tensor.device.type == "meta" for _, tensor in half.to("meta").items())


def test_what_cannot_be_joined_is_named() -> None:
    with pytest.raises(ValueError, match="only some of them have pooled"):
        Conditioning.cat([full(1), full(1).replace(pooled=None)])
    with pytest.raises(ValueError, match=r"their states have the shapes \[\(5, 3\), \(4, 3\)\]"):
        Conditioning.cat([Conditioning(states=torch.zeros(1, 5, 3)), Conditioning(states=torch.zeros(1, 4, 3))])
    mixed = Conditioning.cat([Conditioning(states=torch.zeros(1, 5, 3)), full(1).replace(**dict.fromkeys(OTHERS))])
    assert mixed.mask is not None
    assert mixed.mask.all()


OTHERS = ("pooled", "time_ids", "labels", "guidance", "channels")


def test_both_sides_of_guidance() -> None:
    both = GuidedConditioning(full(2, 1.0), full(2, -1.0))
    assert both.joint.states is not None
    assert both.joint.states[:, 0, 0].tolist() == [-1, -1, 1, 1]
    negative, positive = both.split(both.joint.states)
    assert negative is not None
    assert (negative.unique().tolist(), positive.unique().tolist()) == ([-1], [1])
    changed = both.with_joint_states(torch.cat([torch.zeros(2, 5, 3), torch.ones(2, 5, 3) * 7]))
    assert changed.positive.states is not None
    assert changed.positive.states.unique().tolist() == [7]
    assert changed.positive.pooled is both.positive.pooled
    alone = both.with_joint_states(torch.zeros(2, 5, 3))
    assert alone.negative is None
    assert alone.joint.batch_size == 2
    assert both.repeat(2).joint.batch_size == 8
    assert GuidedConditioning(full(2)).joint.batch_size == 2
    assert both.replace(channels=None).joint.channels is None


def test_arguments_of_a_unet() -> None:
    assert set(full(1).arguments()) == {
        "encoder_hidden_states",
        "encoder_attention_mask",
        "class_labels",
        "timestep_cond",
        "added_cond_kwargs",
    }
    assert Conditioning().arguments() == {}
    assert Conditioning().batch_size is None


@pytest.mark.parametrize("parts", [clip_parts, bert_parts])
def test_text_becomes_states(parts: object) -> None:
    made = parts()  # type: ignore[operator]
    conditioner = TextConditioner(**made)
    states = conditioner(["a red cup", ""]).states
    assert states is not None
    assert states.shape == (2, 12, 16)
    torch.testing.assert_close(states[1:], conditioner([""]).states)
    with pytest.raises(ValueError, match="long_prompts='fold' is not known; choose from cut, chunk"):
        TextConditioner(**made, long_prompts="fold")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no text encoder"):
        TextConditioner(None, None)(["a"])


def test_long_prompts_in_chunks() -> None:
    conditioner = TextConditioner(**clip_parts(), long_prompts="chunk")
    states = conditioner(["a red cup, a blue cup", "x"]).states
    assert states is not None
    assert states.shape[1] == 12 * conditioner.chunks(["a red cup, a blue cup"]) > 12
    other, chunks = conditioner.of_length(states.shape[1])
    assert other([""], chunks).states.shape == (1, states.shape[1], 16)  # type: ignore[union-attr]
    other, chunks = conditioner.of_length(7)
    assert other([""], chunks).states.shape == (1, 7, 16)  # type: ignore[union-attr]


def test_classes_and_nothing() -> None:
    conditioner = ClassConditioner({"cat": 0, "dog": 1})
    assert conditioner(["dog", "", "cat"]).labels.tolist() == [1, 2, 0]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="there is no class 'cow'; there are cat, dog"):
        conditioner(["cow"])
    assert NoConditioner()(["cow"]) == Conditioning()
