"""The objective on a network whose answer is known, and on a real one."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from tiny import UNET
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion import GaussianDiffusion
from latentdiff.diffusion.losses import bound_term
from latentdiff.diffusion.timesteps import LossSecondMoment
from latentdiff.models import UNet2DConditionModel
from latentdiff.training.batch.batch_types import DiffusionBatch, Tokens
from latentdiff.training.objectives.diffusion import DenoiserObjective

HYBRID = UNET | {"out_channels": 8}
TIMESTEPS = torch.tensor([0, 250, 999])


class Answer(nn.Module):
    """A network that always gives the same, and notes what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> UNet2DConditionOutput:
        self.asked = sample
        return UNet2DConditionOutput(sample=self.answer)


def draws_of(timesteps: Tensor, of: int = 1000) -> Tensor:
    """From which a process of `of` timesteps takes these."""
    return (timesteps.double() + 0.5) / of


@pytest.fixture
def batch() -> DiffusionBatch:
    generator = torch.Generator().manual_seed(0)
    return DiffusionBatch(
        latents=torch.randn(3, 4, 8, 8, generator=generator),
        noise=torch.randn(3, 4, 8, 8, generator=generator),
        draws=draws_of(TIMESTEPS),
        condition=Conditioning(torch.randn(3, 5, 16, generator=generator)),
        loss_weight=torch.ones(3),
    )


def held_out(objective: DenoiserObjective, batch: DiffusionBatch) -> Tensor:
    return objective(batch, held_out=True).figures["val_loss"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_weighted_squared_error(
    prediction_type: str, gamma: float | None, batch: DiffusionBatch
) -> None:
    process = GaussianDiffusion("linear", prediction_type=prediction_type)
    unet = Answer(0.5 * torch.randn(3, 4, 8, 8))
    found = DenoiserObjective(unet, process, gamma).per_sample(batch, TIMESTEPS)
    alpha_bar = process.alphas_cumprod[TIMESTEPS].view(3, 1, 1, 1)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x, noise = batch.latents.double(), batch.noise.double()
    torch.testing.assert_close(unet.asked, (signal * x + sigma * noise).float())
    target = {"epsilon": noise, "sample": x, "v_prediction": signal * noise - sigma * x}[prediction_type]
    expected = (unet.answer - target).square().mean((1, 2, 3))
    if gamma is not None:
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        clamped = torch.minimum(snr, torch.tensor(gamma))
        expected = (
            expected
            * {"epsilon": clamped / snr, "sample": clamped, "v_prediction": clamped / (snr + 1)}[prediction_type]
        )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_a_perfect_answer_costs_nothing(batch: DiffusionBatch) -> None:
    process = GaussianDiffusion("scaled_linear", prediction_type="v_prediction", zero_terminal_snr=True)
    target = process.target(batch.latents, batch.noise, TIMESTEPS)
    assert float(DenoiserObjective(Answer(target), process, 5.0)(batch).watched) < 1e-10


def test_hybrid_is_the_simple_loss_and_the_bound(batch: DiffusionBatch) -> None:
    process = GaussianDiffusion("cosine", num_timesteps=1000, variance_type="learned_range")
    answer = 0.5 * torch.randn(3, 8, 8, 8)
    unet = Answer(answer)
    objective = DenoiserObjective(unet, process, 5.0)
    args = (batch.latents, TIMESTEPS)
    simple = process.error(answer, batch.latents, batch.noise, TIMESTEPS)
    bound = bound_term(process, answer, *args, process.q_sample(*args, batch.noise))
    weight = process.min_snr_weight(TIMESTEPS, 5.0)
    losses = objective.per_sample(batch, TIMESTEPS)
    torch.testing.assert_close(losses.detach(), simple * weight + bound)
    torch.testing.assert_close(held_out(objective, batch).detach(), simple)
    losses.sum().backward()
    assert unet.answer.grad is not None
    mean_gradient = 2 * (answer[:, :4] - batch.noise) / (4 * 8 * 8) * weight.view(3, 1, 1, 1)
    torch.testing.assert_close(unet.answer.grad[:, :4], mean_gradient)
    assert (unet.answer.grad[:, 4:].flatten(1).abs().amax(1) > 0).all()


def test_pictures_are_weighted(batch: DiffusionBatch) -> None:
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion(prediction_type="v_prediction"), 5.0)
    losses = objective.per_sample(batch, TIMESTEPS)
    torch.testing.assert_close(objective(batch).loss, losses.mean())
    weight = torch.tensor([1.0, 0.5, 0.0])
    weighted = replace(batch, loss_weight=weight)
    torch.testing.assert_close(objective(weighted).loss, (losses * weight).mean())
    torch.testing.assert_close(objective.per_sample(weighted, TIMESTEPS), losses * weight)


def test_pictures_are_weighted_by_nothing_when_held_out(batch: DiffusionBatch) -> None:
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion(prediction_type="v_prediction"), 5.0)
    plain = DenoiserObjective(objective.denoiser, objective.process)
    found = held_out(objective, replace(batch, loss_weight=torch.zeros(3)))
    torch.testing.assert_close(found, plain.per_sample(batch, TIMESTEPS))


def test_the_text_is_trained_where_the_objective_has_it(batch: DiffusionBatch) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=5, bos_token_id=18, eos_token_id=19, pad_token_id=19,
    )  # fmt: skip
    text_encoder, process = CLIPTextModel(config), GaussianDiffusion()
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), process, text_encoder=text_encoder)
    ids = torch.randint(0, 18, (3, 5))
    states = text_encoder(ids).last_hidden_state
    loss = objective(replace(batch, condition=Tokens(ids))).loss
    torch.testing.assert_close(loss, objective(replace(batch, condition=Conditioning(states))).loss)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in text_encoder.parameters())
    mask = torch.ones_like(ids)
    mask[:, 3:] = 0
    assert not torch.equal(objective(replace(batch, condition=Tokens(ids, mask))).loss, loss)


def test_a_real_network_learns_its_variances(batch: DiffusionBatch) -> None:
    torch.manual_seed(0)
    process = GaussianDiffusion("linear", variance_type="learned_range")
    objective = DenoiserObjective(UNet2DConditionModel(**HYBRID), process)
    timesteps = torch.tensor([2, 3, 4])
    batch = replace(batch, draws=draws_of(timesteps))
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)

    def bound() -> float:
        with torch.no_grad():
            return float((objective.per_sample(batch, timesteps) - held_out(objective, batch)).mean())

    before = bound()
    for _ in range(15):
        optimizer.zero_grad()
        objective(batch).loss.backward()
        optimizer.step()
    assert bound() < 0.7 * before


@pytest.mark.parametrize("hybrid", [False, True])
def test_compiles_without_a_break(hybrid: bool, batch: DiffusionBatch) -> None:
    torch._dynamo.reset()
    process = GaussianDiffusion(variance_type="learned_range" if hybrid else "fixed_small")
    objective = DenoiserObjective(UNet2DConditionModel(**HYBRID if hybrid else UNET), process, 5.0)
    found = torch.compile(objective, backend="eager", fullgraph=True)(batch)
    torch.testing.assert_close(found.loss, objective(batch).loss)


def test_what_does_not_fit_is_refused(batch: DiffusionBatch) -> None:
    learned = GaussianDiffusion(variance_type="learned_range")
    with pytest.raises(ValueError, match=r"gives 4 channels .*out_channels=8"):
        DenoiserObjective(UNet2DConditionModel(**UNET), learned)(batch)
    with pytest.raises(ValueError, match=r"gives 8 channels .*out_channels=4"):
        DenoiserObjective(UNet2DConditionModel(**HYBRID), GaussianDiffusion())(batch)
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion())
    with pytest.raises(ValueError, match="has no text_encoder"):
        objective(replace(batch, condition=Tokens(torch.zeros(3, 5, dtype=torch.long))))


def test_drawn_timesteps_are_weighted_and_remembered(batch: DiffusionBatch) -> None:
    process = GaussianDiffusion("linear", 4)
    sampler = LossSecondMoment(4, history=1, uniform=0.0)
    sampler.update(torch.arange(4), torch.tensor([1.0, 1.0, 2.0, 4.0]))
    answer = Answer(torch.zeros(3, 4, 8, 8))
    objective = DenoiserObjective(answer, process, timestep_sampler=sampler)
    drawn, weights = torch.tensor([0, 2, 3]), torch.tensor([2.0, 1.0, 0.5])
    batch = replace(batch, draws=torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64))
    losses = objective.per_sample(batch, drawn)
    torch.testing.assert_close(objective(batch).loss, (weights * losses).mean())
    assert torch.equal(held_out(objective, batch), held_out(DenoiserObjective(answer, process), batch))
    for made, remembered in ((False, [1.0, 1.0, 2.0, 4.0]), (True, [1.0, 1.0, 2.0, 4.0])):
        objective.after_update(made)  # the second time there is nothing new
        assert sampler.history[:, 0].tolist() == remembered
    objective(batch)
    objective.after_update(True)
    wanted = [losses[0].item(), 1.0, losses[1].item(), losses[2].item()]
    assert sampler.history[:, 0].tolist() == wanted


def test_p2_takes_the_place_of_min_snr(batch: DiffusionBatch) -> None:
    process, answer = GaussianDiffusion("linear"), Answer(torch.randn(3, 4, 8, 8))
    plain = DenoiserObjective(answer, process).per_sample(batch, TIMESTEPS)
    found = DenoiserObjective(answer, process, 5.0, p2_gamma=0.5).per_sample(batch, TIMESTEPS)
    torch.testing.assert_close(found, plain * process.p2_weight(TIMESTEPS, 0.5))
