"""The objective on a network whose answer is known, and on a real one."""

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.diffusion import GaussianDiffusion
from latentdiff.diffusion.losses import bound_term, simple_loss
from latentdiff.diffusion.timesteps import LossSecondMoment
from latentdiff.models import UNet2DConditionModel
from latentdiff.training.objective import DenoiserObjective

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
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


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "noise": torch.randn(3, 4, 8, 8, generator=generator),
        "timesteps": TIMESTEPS,
        "encoder_hidden_states": torch.randn(3, 5, 16, generator=generator),
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_weighted_squared_error(
    prediction_type: str, gamma: float | None, batch: dict[str, Tensor]
) -> None:
    process = GaussianDiffusion("linear", prediction_type=prediction_type)
    unet = Answer(0.5 * torch.randn(3, 4, 8, 8))
    found = DenoiserObjective(unet, process, gamma).per_sample(**batch)
    alpha_bar = process.alphas_cumprod[TIMESTEPS].view(3, 1, 1, 1)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x, noise = batch["latents"].double(), batch["noise"].double()
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


def test_a_perfect_answer_costs_nothing(batch: dict[str, Tensor]) -> None:
    process = GaussianDiffusion("scaled_linear", prediction_type="v_prediction", zero_terminal_snr=True)
    target = process.training_target(batch["latents"], batch["timesteps"], batch["noise"])
    assert float(DenoiserObjective(Answer(target), process, 5.0)(**batch).detach()) < 1e-10


def test_hybrid_is_the_simple_loss_and_the_bound(batch: dict[str, Tensor]) -> None:
    process = GaussianDiffusion("cosine", num_timesteps=1000, variance_type="learned_range")
    answer = 0.5 * torch.randn(3, 8, 8, 8)
    unet = Answer(answer)
    objective = DenoiserObjective(unet, process, 5.0)
    args = (batch["latents"], batch["timesteps"])
    simple = simple_loss(process, answer, *args, batch["noise"])
    bound = bound_term(process, answer, *args, process.q_sample(*args, batch["noise"]))
    weight = process.min_snr_weight(TIMESTEPS, 5.0)
    losses = objective.per_sample(**batch)
    torch.testing.assert_close(losses.detach(), simple * weight + bound)
    torch.testing.assert_close(objective(**batch, held_out=True).detach(), simple)
    losses.sum().backward()
    assert unet.answer.grad is not None
    mean_gradient = 2 * (answer[:, :4] - batch["noise"]) / (4 * 8 * 8) * weight.view(3, 1, 1, 1)
    torch.testing.assert_close(unet.answer.grad[:, :4], mean_gradient)
    assert (unet.answer.grad[:, 4:].flatten(1).abs().amax(1) > 0).all()


def test_pictures_are_weighted(batch: dict[str, Tensor]) -> None:
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion(prediction_type="v_prediction"), 5.0)
    losses = objective.per_sample(**batch)
    torch.testing.assert_close(objective(**batch), losses.mean())
    weight = torch.tensor([1.0, 0.5, 0.0])
    torch.testing.assert_close(objective(**batch, loss_weight=weight), (losses * weight).mean())
    torch.testing.assert_close(objective.per_sample(**batch, loss_weight=weight), losses * weight)


def test_pictures_are_weighted_by_nothing_when_held_out(batch: dict[str, Tensor]) -> None:
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion(prediction_type="v_prediction"), 5.0)
    plain = DenoiserObjective(objective.unet, objective.process)
    found = objective(**batch, loss_weight=torch.zeros(3), held_out=True)
    torch.testing.assert_close(found, plain.per_sample(**batch))


def test_the_text_is_trained_where_the_objective_has_it(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=5, bos_token_id=18, eos_token_id=19, pad_token_id=19,
    )  # fmt: skip
    text_encoder, process = CLIPTextModel(config), GaussianDiffusion()
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), process, text_encoder=text_encoder)
    ids = torch.randint(0, 18, (3, 5))
    states = text_encoder(ids).last_hidden_state
    given = {key: batch[key] for key in ("latents", "noise", "timesteps")}
    loss = objective(**given, input_ids=ids)
    torch.testing.assert_close(loss, objective(**batch | {"encoder_hidden_states": states}))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in text_encoder.parameters())
    mask = torch.ones_like(ids)
    mask[:, 3:] = 0
    assert not torch.equal(objective(**given, input_ids=ids, attention_mask=mask), loss)


def test_a_real_network_learns_its_variances(batch: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    process = GaussianDiffusion("linear", variance_type="learned_range")
    objective = DenoiserObjective(UNet2DConditionModel(**HYBRID), process)
    batch["timesteps"] = torch.tensor([2, 3, 4])
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)

    def bound() -> float:
        with torch.no_grad():
            return float((objective.per_sample(**batch) - objective(**batch, held_out=True)).mean())

    before = bound()
    for _ in range(15):
        optimizer.zero_grad()
        objective(**batch).backward()
        optimizer.step()
    assert bound() < 0.7 * before


@pytest.mark.parametrize("hybrid", [False, True])
def test_compiles_without_a_break(hybrid: bool, batch: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    process = GaussianDiffusion(variance_type="learned_range" if hybrid else "fixed_small")
    objective = DenoiserObjective(UNet2DConditionModel(**HYBRID if hybrid else UNET), process, 5.0)
    found = torch.compile(objective, backend="eager", fullgraph=True)(**batch)
    torch.testing.assert_close(found, objective(**batch))


def test_what_does_not_fit_is_refused(batch: dict[str, Tensor]) -> None:
    learned = GaussianDiffusion(variance_type="learned_range")
    with pytest.raises(ValueError, match=r"gives 4 channels .*'learned_range'.*out_channels=8"):
        DenoiserObjective(UNet2DConditionModel(**UNET), learned)(**batch)
    with pytest.raises(ValueError, match=r"gives 8 channels .*'fixed_small'.*out_channels=4"):
        DenoiserObjective(UNet2DConditionModel(**HYBRID), GaussianDiffusion())(**batch)
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion())
    ids = torch.zeros(3, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="either encoder_hidden_states or input_ids"):
        objective(**batch, input_ids=ids)
    del batch["encoder_hidden_states"]
    with pytest.raises(ValueError, match="has no text_encoder"):
        objective(**batch, input_ids=ids)


def test_drawn_timesteps_are_weighted_and_remembered(batch: dict[str, Tensor]) -> None:
    process = GaussianDiffusion("linear", 4)
    sampler = LossSecondMoment(4, history=1, uniform=0.0)
    sampler.update(torch.arange(4), torch.tensor([1.0, 1.0, 2.0, 4.0]))
    objective = DenoiserObjective(Answer(torch.zeros(3, 4, 8, 8)), process, timestep_sampler=sampler)
    given = {**batch, "timesteps": torch.zeros(3, dtype=torch.long)}
    drawn, weights = torch.tensor([0, 2, 3]), torch.tensor([2.0, 1.0, 0.5])
    draws = torch.tensor([0.1, 0.3, 0.9])
    losses = objective.per_sample(**{**given, "timesteps": drawn})
    torch.testing.assert_close(objective(**given, timestep_draws=draws), (weights * losses).mean())
    assert torch.equal(objective(**given, timestep_draws=draws, held_out=True), objective(**given, held_out=True))
    for sound, remembered in ((False, [1.0, 1.0, 2.0, 4.0]), (True, [1.0, 1.0, 2.0, 4.0])):
        objective.after_update(sound)  # the second time there is nothing new
        assert sampler.history[:, 0].tolist() == remembered
    objective(**given, timestep_draws=draws)
    objective.after_update(True)
    wanted = [losses[0].item(), 1.0, losses[1].item(), losses[2].item()]
    assert sampler.history[:, 0].tolist() == wanted


def test_p2_takes_the_place_of_min_snr(batch: dict[str, Tensor]) -> None:
    process, answer = GaussianDiffusion("linear"), Answer(torch.randn(3, 4, 8, 8))
    plain = DenoiserObjective(answer, process).per_sample(**batch)
    found = DenoiserObjective(answer, process, 5.0, p2_gamma=0.5).per_sample(**batch)
    torch.testing.assert_close(found, plain * process.p2_weight(TIMESTEPS, 0.5))
