"""Codebooks that learn without gradients, against their definitions; and the bottlenecks with codes."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CODER
from torch import Tensor

from latentdiff.models import FSQModel, GumbelVQModel, VQModel
from latentdiff.models.bottlenecks import FiniteScalarQuantizer, GumbelQuantizer, VectorQuantizer
from latentdiff.models.codebook_learning import CodebookLearner, kmeans


def grid(vectors: Tensor) -> Tensor:
    """(N, D) as an encoder's output, (1, D, 1, N)."""
    return vectors.T[None, :, None]


def step(learner: CodebookLearner, quantizer: VectorQuantizer, *batches: Tensor) -> None:
    for vectors in batches:
        learner.observe(grid(vectors), quantizer.nearest(grid(vectors)))
    learner.update()


def test_codes_are_the_moving_averages_of_their_vectors() -> None:
    quantizer = VectorQuantizer(3, 2)
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 50.0]])
    quantizer.embedding.weight.data.copy_(codes)
    learner = CodebookLearner(quantizer, decay=0.9, start="none", restart_after=0)
    assert not quantizer.embedding.weight.requires_grad
    counts, sums, expected = torch.zeros(3), torch.zeros(3, 2), codes.clone()
    for number in range(5):
        vectors = torch.randn(40, 2) + torch.where(torch.rand(40, 1) < 0.3, 10.0, 0.0) * torch.tensor([1.0, 0.0])
        chosen = torch.cdist(vectors, expected).argmin(1)
        for code in range(3):
            mine = vectors[chosen == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
            if len(mine):
                expected[code] = sums[code] / counts[code]
        # An update of two passes is an update of both together.
        step(learner, quantizer, *(vectors.split(20) if number % 2 else [vectors]))
        torch.testing.assert_close(quantizer.embedding.weight.data, expected)
    assert torch.equal(quantizer.embedding.weight[2], codes[2])
    assert learner.idle.tolist() == [0, 0, 5]
    assert learner.statistics(recent=5)["codes_in_use"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("start", ["kmeans", "data"])
def test_a_start_from_data_finds_every_cluster(start: Any) -> None:
    centres = torch.tensor(list(itertools.product((-8.0, 8.0), repeat=3)))  # 8 of them
    vectors = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(400, 3)
    quantizer = VectorQuantizer(24, 3)
    learner = CodebookLearner(quantizer, start=start)
    step(learner, quantizer, vectors)
    found = torch.cdist(centres, quantizer.embedding.weight).min(1).values
    if start == "kmeans":
        assert found.max() < 0.1
    else:
        assert torch.cdist(quantizer.embedding.weight, vectors).min(1).values.max() < 0.1


def test_kmeans_never_leaves_a_centre_empty() -> None:
    vectors = torch.randn(200, 2)
    centres = kmeans(vectors, torch.full((20, 2), 100.0) + torch.rand(20, 2))
    assert len(torch.cdist(vectors, centres).argmin(1).unique()) == 20


def test_more_codes_than_vectors_stay_apart() -> None:
    quantizer = VectorQuantizer(16, 2)
    step(CodebookLearner(quantizer, start="data"), quantizer, torch.randn(5, 2))
    assert len(quantizer.embedding.weight.unique(dim=0)) == 16


def test_dead_codes_go_where_vectors_are() -> None:
    quantizer = VectorQuantizer(8, 2)
    quantizer.embedding.weight.data = torch.cat([torch.zeros(1, 2), torch.full((7, 2), 1e3)])
    learner = CodebookLearner(quantizer, start="none", restart_after=3)
    for number in range(4):
        assert (quantizer.embedding.weight[1:] == 1e3).all() == (number < 3)
        step(learner, quantizer, torch.randn(100, 2))
    for _ in range(10):
        step(learner, quantizer, torch.randn(100, 2))
    assert quantizer(grid(torch.randn(400, 2))).statistics["codes_used"] == 1
    assert quantizer.embedding.weight.abs().max() < 10


def test_codes_that_learn_by_gradient_restart_too() -> None:
    quantizer = VectorQuantizer(4, 2)
    quantizer.embedding.weight.data = torch.cat([torch.zeros(1, 2), torch.full((3, 2), 1e3)])
    learner = CodebookLearner(quantizer, decay=None, start="none", restart_after=2)
    assert quantizer.embedding.weight.requires_grad
    for _ in range(2):
        step(learner, quantizer, torch.randn(50, 2))
    assert torch.equal(quantizer.embedding.weight[0], torch.zeros(2))  # averages do not move it
    assert quantizer.embedding.weight.abs().max() < 10


def test_what_is_not_finite_or_was_left_out_changes_nothing() -> None:
    quantizer = VectorQuantizer(4, 2)
    learner = CodebookLearner(quantizer, start="none")
    before = quantizer.embedding.weight.clone()
    step(learner, quantizer, torch.full((9, 2), math.nan))
    assert torch.equal(quantizer.embedding.weight, before)
    learner.observe(grid(torch.randn(9, 2)), quantizer.nearest(grid(torch.randn(9, 2))))
    learner.forget()
    learner.update()
    assert torch.equal(quantizer.embedding.weight, before)


def test_cosine_codes_lie_on_the_sphere_and_mean_the_same_to_a_plain_quantizer() -> None:
    quantizer, plain = VectorQuantizer(32, 4), VectorQuantizer(32, 4)
    quantizer.distance = "cosine"
    learner = CodebookLearner(quantizer)
    for _ in range(3):
        step(learner, quantizer, torch.randn(500, 4) * 20)
    weight = quantizer.embedding.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(32))
    plain.embedding.weight.data = weight.data
    h = torch.randn(2, 4, 5, 6) * 3
    assert torch.equal(plain.nearest(h), quantizer.nearest(h))
    torch.testing.assert_close(plain(h).latents, quantizer(h).latents)


@pytest.mark.parametrize(
    "wrong", [{"decay": 1.0}, {"start": "median"}, {"restart_after": -1}], ids=lambda wrong: next(iter(wrong))
)
def test_settings_of_a_learner_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CodebookLearner(VectorQuantizer(4, 2), **wrong)


@pytest.mark.parametrize("build", [lambda n: VectorQuantizer(n, 2), lambda n: GumbelQuantizer(2, n, 2)])
def test_a_codebook_of_nothing_is_refused(build: Callable[[int], object]) -> None:
    with pytest.raises(ValueError, match="at least one code"):
        build(0)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 4, 7), (2, 2)])
def test_finite_scalars_are_the_papers(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    h = torch.randn(3, len(levels), 16, 16) * 3
    output = quantizer(h)
    for channel, level in enumerate(levels):  # Mentzer et al. 2023, App. A.1, one number at a time
        half, offset = (level - 1) * (1 - 1e-3) / 2, 0.5 if level % 2 == 0 else 0.0
        values = h[:, channel].flatten().tolist()
        expected = [round(math.tanh(x + math.tan(offset / half)) * half - offset) / (level // 2) for x in values]
        torch.testing.assert_close(output.latents[:, channel].flatten(), torch.tensor(expected))
        assert len(set(expected)) == level
    every = torch.arange(math.prod(levels)).view(1, 1, -1)
    assert len(quantizer.lookup(every)[0, :, 0].T.unique(dim=0)) == math.prod(levels)
    torch.testing.assert_close(quantizer.lookup(output.indices), output.latents)


def test_finite_scalars_pass_the_gradient_through() -> None:
    quantizer = FiniteScalarQuantizer((5, 8))
    h = torch.randn(2, 2, 3, 3, requires_grad=True)
    (ours,) = torch.autograd.grad(quantizer(h).latents.sum(), h)
    (smooth,) = torch.autograd.grad((quantizer.bound(h) / torch.tensor([2.0, 4.0]).view(2, 1, 1)).sum(), h)
    torch.testing.assert_close(ours, smooth)
    with pytest.raises(ValueError, match="levels"):
        FiniteScalarQuantizer((5, 1))


def test_gumbel_draws_follow_the_encoder_and_harden() -> None:
    quantizer = GumbelQuantizer(3, 5, 2)
    h = torch.randn(1, 3, 1, 1).expand(1, 3, 200, 200)
    expected = quantizer.proj(h)[0, :, 0, 0].softmax(0)
    quantizer.hard, quantizer.temperature = True, 0.5
    drawn = quantizer(h, generator=[torch.Generator().manual_seed(1)])
    codes = torch.cdist(drawn.latents[0].flatten(1).T, quantizer.embedding.weight).argmin(1)
    shares = torch.bincount(codes, minlength=5) / 40_000
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    kl = (expected * (expected.log() + math.log(5))).sum()
    torch.testing.assert_close(drawn.losses["uniform_kl"], kl)
    again = quantizer(h, generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(again.latents, drawn.latents)
    likeliest = quantizer(h, sample=False)
    assert torch.equal(quantizer.eval()(h).latents, likeliest.latents)
    assert torch.equal(likeliest.latents[0, :, 0, 0], quantizer.embedding.weight[expected.argmax()])


def test_gumbel_gradient_reaches_encoder_and_codes() -> None:
    quantizer = GumbelQuantizer(3, 5, 2)
    h = torch.randn(2, 3, 4, 4, requires_grad=True)
    for quantizer.hard in (False, True):
        gradients = torch.autograd.grad(quantizer(h).latents.square().sum(), [h, *quantizer.parameters()])
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


MODELS: dict[str, Callable[[], Any]] = {
    "vq": lambda: VQModel(**CODER, num_vq_embeddings=9, latent_channels=4, vq_embed_dim=3),
    "gumbel": lambda: GumbelVQModel(**CODER, num_vq_embeddings=9, latent_channels=4, vq_embed_dim=3),
    "fsq": lambda: FSQModel(**CODER, levels=(3, 5, 4)),
}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_indices_there_and_back(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]().eval()
    pixels = torch.rand(2, 3, 24, 16) * 2 - 1
    indices = model.encode_to_indices(pixels)
    assert indices.shape == (2, 12, 8)
    assert indices.dtype == torch.int64
    assert 0 <= indices.min() <= indices.max() < model.codes
    whole = model(pixels)
    torch.testing.assert_close(model.decode_from_indices(indices), whole.sample)
    torch.testing.assert_close(model.decode(model.encode(pixels).latents).sample, whole.sample)
    assert torch.equal(whole.bottleneck.indices, indices)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(pixels).sample, whole.sample)
    assert again.config.get("levels", (3, 5, 4)) in ((3, 5, 4), [3, 5, 4])
    model.to(torch.bfloat16)
    assert model.decode_from_indices(indices).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MODELS)
def test_wrong_indices_are_refused(kind: str) -> None:
    model = MODELS[kind]()
    for wrong, message in [
        (torch.zeros(2, 4, dtype=torch.long), r"\(2, 4\)"),
        (torch.zeros(1, 4, 4), "float32"),
        (torch.full((1, 4, 4), 99), f"0 to {model.codes - 1}"),
        (torch.full((1, 4, 4), -1), "from -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.decode_from_indices(wrong)


def test_a_model_of_another_bottleneck_is_refused(tmp_path: Path) -> None:
    MODELS["fsq"]().save_pretrained(tmp_path)
    for other in (VQModel, GumbelVQModel):
        with pytest.raises(ValueError, match="levels"):
            other.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_vq_embeddings=0"):
        VQModel(**CODER, num_vq_embeddings=0)
