"""The transformer over codes: beside torch's own blocks and diffusers' rotations, and with its cache."""

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.models import TokenTransformer
from latentdiff.models.token_blocks import TokenBlock, rotations

SMALL: dict[str, Any] = {
    "num_vq_embeddings": 11,
    "sample_size": (3, 4),
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def model(**changes: Any) -> TokenTransformer:
    torch.manual_seed(0)
    made = TokenTransformer(**{**SMALL, **changes}).eval()
    for name, parameter in made.named_parameters():
        if "embedding" not in name:
            nn.init.normal_(parameter, std=0.3)  # far from where nothing matters
    return made


def some_codes(batch: int = 2) -> Tensor:
    return torch.randint(0, 11, (batch, 3, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_block_is_torchs(causal: bool) -> None:
    theirs = nn.TransformerDecoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    theirs.multihead_attn.in_proj_bias.zero_()
    ours = TokenBlock(16, 2, 16)
    own = {
        "attn1.to_qkv.weight": theirs.self_attn.in_proj_weight,
        "attn1.to_qkv.bias": theirs.self_attn.in_proj_bias,
        "attn1.to_out.weight": theirs.self_attn.out_proj.weight,
        "attn1.to_out.bias": theirs.self_attn.out_proj.bias,
        "attn2.to_out.0.weight": theirs.multihead_attn.out_proj.weight,
        "attn2.to_out.0.bias": theirs.multihead_attn.out_proj.bias,
        **{
            f"ff.{a}.{kind}": getattr(getattr(theirs, b), kind)
            for a, b in ((0, "linear1"), (2, "linear2"))
            for kind in ("weight", "bias")
        },
        **{
            f"norm{i}.{kind}": getattr(getattr(theirs, f"norm{i}"), kind)
            for i in (1, 2, 3)
            for kind in ("weight", "bias")
        },
    }
    own |= {
        f"attn2.to_{n}.weight": w for n, w in zip("qkv", theirs.multihead_attn.in_proj_weight.chunk(3), strict=True)
    }
    ours.load_state_dict(own)
    x, text = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
    torch.testing.assert_close(ours(x, None, causal, text), theirs(x, text, tgt_mask=mask, tgt_is_causal=causal))


def test_rotations_are_diffusers() -> None:
    x = torch.randn(1, 2, 12, 16)
    cosines, sines = get_2d_rotary_pos_embed(16, ((0, 0), (3, 4)), (3, 4), output_type="pt")
    # diffusers' first half turns with the column
    wanted = apply_rotary_emb(x.roll(8, dims=-1), (cosines, sines)).roll(8, dims=-1)
    torch.testing.assert_close(rotations(3, 4, 16, x)(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "axial"])
@pytest.mark.parametrize("condition", ["text", "class", "none"])
@torch.no_grad()
def test_the_cache_changes_nothing(positions: str, condition: str) -> None:
    more = {"text": {"cross_attention_dim": 6}, "class": {"num_classes": 3}, "none": {}}[condition]
    given = {
        "text": Conditioning(states=torch.randn(2, 5, 6), mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])),
        "class": Conditioning(labels=torch.tensor([0, 3])),
        "none": Conditioning(),
    }[condition]
    network, codes = model(positions=positions, **more), some_codes()
    whole = network(codes, **given.arguments())
    assert whole.shape == (2, 11, 3, 4)
    prepared, cache = network.prepare(given), network.begin(2, 3, 4)
    before, steps = None, []
    for place in range(12):
        steps.append(network.next_logits(before, prepared, cache))
        before = codes.flatten(1)[:, place]
    torch.testing.assert_close(torch.stack(steps, dim=2).unflatten(2, (3, 4)), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_raster_order_sees_what_is_before_alone() -> None:
    network, codes = model(), some_codes()
    changed = codes.clone()
    changed[:, 1, 1] = (changed[:, 1, 1] + 1) % 11
    differs = (network(codes) != network(changed)).any(1).flatten(1)
    assert not differs[:, :6].any()  # its own place included
    assert differs[:, 6:].all()


@torch.no_grad()
def test_the_masked_order_sees_all_but_what_is_hidden() -> None:
    network, codes = model(order="masked"), some_codes()
    changed = codes.clone()
    changed[:, 2, 3] = (changed[:, 2, 3] + 1) % 11
    assert (network(codes) != network(changed)).any(1).all()
    codes[:, 2, 3] = changed[:, 2, 3] = network.codes
    assert torch.equal(network(codes), network(changed))


@torch.no_grad()
def test_text_and_its_mask_matter() -> None:
    network, codes = model(cross_attention_dim=6), some_codes(1)
    states, mask = torch.randn(1, 5, 6), torch.tensor([[1, 1, 0, 0, 0]])
    seen, other = network(codes, states, mask), states.clone()
    other[:, 2:] += 1
    assert torch.equal(network(codes, other, mask), seen)
    other[:, 0] += 1
    assert not torch.equal(network(codes, other, mask), seen)


def test_gradients_are_the_same_with_checkpointing() -> None:
    network, codes = model(num_classes=2).train(), some_codes()
    labels = torch.tensor([1, 2])
    network(codes, class_labels=labels).square().mean().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    network.enable_gradient_checkpointing()
    network(codes, class_labels=labels).square().mean().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 3, 4), 11), "codes must lie from 0 to 10, and there is 11"),
        (torch.full((1, 3, 4), -1), "and there is -1"),
        (torch.zeros(1, 4, 4, dtype=torch.long), r"4 x 4 codes are more than the 3 x 4"),
        (torch.zeros(1, 12), r"whole numbers \(B, h, w\)"),
    ],
)
def test_what_are_no_codes_is_refused(codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model()(codes)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="order='zigzag' is not supported; use one of 'raster', 'masked'"):
        TokenTransformer(**SMALL | {"order": "zigzag"})
    with pytest.raises(ValueError, match="attention_head_dim=6 is not a multiple"):
        TokenTransformer(**SMALL | {"attention_head_dim": 6})
    for key, value, said in (
        ("order", ["raster"], "is not supported; use one of"),
        ("positions", ["axial"], "is not supported; use one of"),
        ("num_layers", 10**9, "is more than the limit of 1000"),
        ("num_classes", -5, "give a whole number, 1 or more"),
        ("num_classes", 1.5, "give a whole number, 1 or more"),
        ("cross_attention_dim", "x", "give a whole number, 1 or more"),
        ("sample_size", None, "is not a size"),
        ("autoencoder_digest", 5, "is no digest"),
    ):
        with pytest.raises(ValueError, match=f"TokenTransformer: {key}=.*{said}"):
            TokenTransformer(**SMALL | {key: value})
    with pytest.raises(ValueError, match="it needs class labels"):
        model(num_classes=3)(some_codes())
    with pytest.raises(ValueError, match="it takes no text states"):
        model()(some_codes(), torch.zeros(2, 5, 6))
