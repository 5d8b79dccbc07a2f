"""The bound of held-out pictures as users measure it, against sums of our own and against what it must be."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from latentdiff import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.cli import application
from latentdiff.diffusion import GaussianDiffusion, RectifiedFlow, build_scheduler
from latentdiff.models import UNet2DModel, VQModel
from latentdiff.training.data import read_pixels
from latentdiff.training.evaluation.evaluate import evaluate_pipeline
from latentdiff.training.evaluation.held_out import held_out_pictures
from latentdiff.training.evaluation.likelihood import evaluate_likelihood
from latentdiff.training.settings import EvaluationSettings, LikelihoodSettings

COLOURS = ["blue", "green", "orange", "purple", "red", "yellow"]


def unet(learned: bool = False, classes: int | None = None, channels: int = 3) -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16 if channels == 3 else 8,
        in_channels=channels,
        out_channels=channels * (2 if learned else 1),
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    return network.eval()


def unconditional(learned: bool = False, vqvae: VQModel | None = None) -> UnconditionalPipeline:
    process = GaussianDiffusion("cosine", 40, variance_type="learned_range" if learned else "fixed_small")
    network = unet(learned, channels=3 if vqvae is None else vqvae.config.latent_channels)
    return UnconditionalPipeline(network, build_scheduler(process, "DDPMScheduler"), vqvae)


def likelihood(pipeline: Any, data: Path, output: Path, **options: Any) -> dict[str, Any]:
    settings = LikelihoodSettings(model="given", data=str(data), split="train", output=str(output), **options)
    return evaluate_likelihood(pipeline, settings)


def test_the_report(pictures: Path, tmp_path: Path) -> None:
    found = likelihood(unconditional(), pictures, tmp_path / "out", steps="8")
    assert json.loads((tmp_path / "out/likelihood.json").read_text()) == found
    assert (found["steps"], found["variance"], found["of"]) == (8, "fixed_small", "pixels")
    assert found["data"]["pictures"] == 10
    assert len(found["terms"]) == 8
    assert found["timesteps"][0] == 0
    assert found["timesteps"][-1] == 39
    assert found["bits_per_dimension"] == pytest.approx(found["prior"] + found["between"] + found["decoder"], rel=1e-5)


def test_worse_than_guessing(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = likelihood(unconditional(), pictures, tmp_path / "pixels", steps="4")  # random weights
    assert found["bits_per_dimension"] > found["guessing"] == 8
    hint = "and without learned variances (loss=hybrid)"
    assert "worse than guessing at random, which needs 8:" in caplog.text
    assert hint in caplog.text
    caplog.clear()
    flow = UnconditionalPipeline(unet(), RectifiedFlow().scheduler())
    likelihood(flow, pictures, tmp_path / "flow", steps="2")
    assert "guessing at random, which needs 8: train for longer\n" in caplog.text
    assert hint not in caplog.text
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks = {**types, "num_vq_embeddings": 16}
    vqvae = VQModel(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, **blocks).eval()
    in_latents = likelihood(unconditional(vqvae=vqvae), pictures, tmp_path / "latents", steps="4")
    assert in_latents["guessing"] == pytest.approx(2.0471, abs=1e-4)  # a standard normal distribution's entropy


def test_batches_change_nothing(pictures: Path, tmp_path: Path) -> None:
    one, many = (likelihood(unconditional(), pictures, tmp_path / str(n), steps="4", batch_size=n) for n in (3, 10))
    assert one["terms"] == pytest.approx(many["terms"], rel=1e-4)
    again = likelihood(unconditional(), pictures, tmp_path / "3", steps="4", batch_size=3, seed=1)
    assert again["terms"] != pytest.approx(one["terms"], rel=1e-4)


def test_what_noise_costs(pictures: Path, tmp_path: Path) -> None:
    """A network that knows the pictures' mean only: each step's divergence is then a closed form of the squared error.

    With sample prediction of 0, q's mean lies coef1 * x_0 away; with the same (fixed small) variance on both sides the
    divergence is that squared over twice the variance.
    """

    class Nothing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = unet()

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            return (torch.zeros_like(x),)

    process = GaussianDiffusion("linear", 10, prediction_type="sample", beta_end=0.5)
    pipeline = UnconditionalPipeline(unet(), build_scheduler(process, "DDPMScheduler"))
    pipeline.unet.forward = Nothing().forward
    found = likelihood(pipeline, pictures, tmp_path / "out")
    settings = LikelihoodSettings(model="given", data=str(pictures), split="train", output=str(tmp_path / "out"))
    real = torch.stack([read_pixels(one, 16, 16) for one in held_out_pictures(settings, tmp_path)[0]]).double()
    square = real.square().mean().item()
    for t in range(1, 10):
        expected = (process.posterior_mean_coef1[t] ** 2 * square / (2 * process.posterior_variance[t])).item()
        assert found["terms"][t] == pytest.approx(expected / math.log(2), rel=1e-4)


def test_learned_variances_can_be_left_out(pictures: Path, tmp_path: Path) -> None:
    pipeline = unconditional(learned=True)
    kinds = ("learned_range", "fixed_small", "fixed_large")
    found = {kind: likelihood(pipeline, pictures, tmp_path / kind, steps="5", variance=kind) for kind in kinds}
    assert {kind: one["variance"] for kind, one in found.items()} == {kind: kind for kind in kinds}
    assert len({round(one["between"], 3) for one in found.values()}) == 3
    own = likelihood(pipeline, pictures, tmp_path / "own", steps="5")
    assert own["terms"] == found["learned_range"]["terms"]


def test_in_latents(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vqvae = VQModel(block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    found = likelihood(unconditional(vqvae=vqvae.eval()), pictures, tmp_path / "out", steps="4")
    assert found["of"] == "latents"
    assert math.isfinite(found["bits_per_dimension"])


def of_colours(known: list[str]) -> ClassConditionalPipeline:
    scheduler = build_scheduler(GaussianDiffusion("cosine", 40), "DDPMScheduler")
    return ClassConditionalPipeline(unet(classes=len(known) + 1), scheduler, id2label=dict(enumerate(known)))


def test_the_class_is_told(labelled: Path, tmp_path: Path) -> None:
    right = likelihood(of_colours(COLOURS), labelled, tmp_path / "a", steps="4", caption_column="colour")
    other = likelihood(of_colours(COLOURS[::-1]), labelled, tmp_path / "b", steps="4", caption_column="colour")
    assert right["terms"] != pytest.approx(other["terms"], rel=1e-5)
    with pytest.raises(ValueError, match=r"\.png.*there is no class 'a .*--caption-column"):
        likelihood(of_colours(COLOURS), labelled, tmp_path / "c", steps="4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "learned_range"}, "has learned no variances: it gives 3 channels and would have to give 6"),
        ({"steps": "99"}, "99 timesteps cannot be kept"),
        ({"steps": "many"}, "'many' is not a number of timesteps"),
    ],
)
def test_what_does_not_fit(pictures: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood(unconditional(), pictures, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command(pictures: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    unconditional(learned=True).save_pretrained(model)
    call = ["likelihood", str(model), "--data", str(pictures), "--split", "train", "--steps", "4", "--count", "3"]
    result = CliRunner().invoke(application(), call)
    assert result.exit_code == 0, result.output
    assert "likelihood.json" in result.output
    found = json.loads((model / "evaluation/likelihood.json").read_text())
    assert (found["data"]["pictures"], found["variance"], found["spacing"]) == (3, "learned_range", "4")
    with pytest.raises(ValueError, match="emoji is no model without text"):
        CliRunner().invoke(application(), [*call[:1], "emoji", *call[2:], "--output", "x"], catch_exceptions=False)


@pytest.mark.parametrize("kind", ["none", "class"])
def test_evaluate_draws_without_text(labelled: Path, tmp_path: Path, kind: str) -> None:
    """Fréchet distance and the like, of the same command as with text."""
    pipeline = unconditional() if kind == "none" else of_colours(COLOURS)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"data": str(labelled), "split": "train", "caption_column": "colour", "steps": 2}
    pipeline.save_pretrained(tmp_path / "model")
    settings = EvaluationSettings(
        model=str(tmp_path / "model"), output=str(tmp_path / "out"), extractor="autoencoder", **options
    )
    report = evaluate_pipeline(pipeline, settings)
    assert report["metrics"]["frechet_distance"] > 0
    assert "reconstruction_psnr" not in report["metrics"]
    assert len(list((tmp_path / "out/samples").glob("*.png"))) == 10
    if kind == "none":
        with pytest.raises(ValueError, match="draws without captions"):
            evaluate_pipeline(pipeline, settings.model_copy(update={"guidance": 2.0}))


@pytest.mark.parametrize("batch_size", [3, 10])
def test_a_flow_of_pixels_that_knows_mean_and_spread(pictures: Path, tmp_path: Path, batch_size: int) -> None:
    """A network that takes every value for N(0.3, 0.8^2): its bits are the mean of a closed form, but for rounding."""
    pipeline = UnconditionalPipeline(unet(), RectifiedFlow(shift=2.0).scheduler())

    def velocity(x: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        t = (timestep / 1000).view(-1, 1, 1, 1)
        share = ((1 - t) * 0.8**2 - t) / ((1 - t) ** 2 * 0.8**2 + t**2)
        return (-share * (x - (1 - t) * 0.3) - 0.3,)

    pipeline.unet.forward = velocity
    found = likelihood(pipeline, pictures, tmp_path / "out", steps="20", batch_size=batch_size)
    settings = LikelihoodSettings(model="given", data=str(pictures), split="train", output=str(tmp_path / "out"))
    real = torch.stack([read_pixels(one, 16, 16) for one in held_out_pictures(settings, tmp_path)[0]])
    nats = torch.distributions.Normal(0.3, 0.8).log_prob(real).mean().item()
    assert found["bits_per_dimension"] == pytest.approx(math.log2(127.5) - nats / math.log(2), abs=2e-3)
    assert (found["steps"], found["variance"], found["guessing"]) == (20, None, 8.0)
    assert "terms" not in found


def test_what_a_flow_does_not_have(pictures: Path, tmp_path: Path) -> None:
    pipeline = UnconditionalPipeline(unet(), RectifiedFlow().scheduler())
    with pytest.raises(ValueError, match="--variance fixed_small: the steps of a flow have none"):
        likelihood(pipeline, pictures, tmp_path / "out", variance="fixed_small")
    for steps in ("10,5", "ddim25", "0"):
        with pytest.raises(ValueError, match=f"--steps {steps}: a flow is followed in a number of even steps"):
            likelihood(pipeline, pictures, tmp_path / "out", steps=steps)
    assert not (tmp_path / "out" / "likelihood.json").exists()
