"""Pipelines without text, beside diffusers' DDPMPipeline and LDMPipeline, and guidance by a classifier."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny import VAE
from torch import Tensor

from latentdiff import ClassConditionalPipeline, UnconditionalPipeline
from latentdiff.diffusion import GaussianDiffusion, build_scheduler
from latentdiff.models import AutoencoderKL, NoisyClassifier, UNet2DModel

UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
CLASSIFIER = {
    "sample_size": 8,
    "num_classes": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "attn_norm_num_groups": 8,
}
NAMES = {0: "cat, kitten", 1: "dog", 2: "bird"}
DRAW = {"num_inference_steps": 4, "output_type": "pt"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler_of(name: str = "DDPMScheduler", prediction: str = "epsilon", variance: str = "fixed_small") -> Any:
    return build_scheduler(GaussianDiffusion("cosine", 100, prediction, variance_type=variance), name)


def classes(scheduler: Any = None, **changes: Any) -> ClassConditionalPipeline:
    parts: dict[str, Any] = {
        "unet": UNet2DModel(**UNET, num_class_embeds=4).eval(),
        "scheduler": scheduler or scheduler_of("DDIMScheduler"),
        "classifier": NoisyClassifier(**CLASSIFIER).eval(),
        "id2label": NAMES,
    }
    return quiet(ClassConditionalPipeline(**{**parts, **changes}))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_pixels_are_those_of_diffusers_ddpm_pipeline(tmp_path: Path, variance: str) -> None:
    unet = UNet2DModel(**UNET, out_channels=6 if variance == "learned_range" else 3).eval()
    ours = quiet(UnconditionalPipeline(unet, scheduler_of(variance=variance)))
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(theirs) is diffusers.DDPMPipeline
    wanted = theirs(2, torch.Generator().manual_seed(1), 4, output_type="np").images
    found = ours(2, torch.Generator().manual_seed(1), 4, output_type="np").images
    assert abs(wanted - found).max() < 1e-5
    again = quiet(UnconditionalPipeline.from_pretrained(tmp_path))
    assert again.defaults["num_inference_steps"] == 1000
    assert torch.equal(again(2, seed=3, **DRAW).images, ours(2, seed=3, **DRAW).images)


def test_latents_are_those_of_diffusers_ldm_pipeline(tmp_path: Path) -> None:
    vae = AutoencoderKL(**VAE).eval()
    unet = UNet2DModel(**UNET, in_channels=4, out_channels=4).eval()
    ours = quiet(UnconditionalPipeline(unet, scheduler_of("DDIMScheduler"), vae))
    ours.save_pretrained(tmp_path)
    theirs = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(theirs) is diffusers.LDMPipeline
    wanted = theirs(2, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
    again = quiet(UnconditionalPipeline.from_pretrained(tmp_path))
    assert type(again.vqvae) is AutoencoderKL
    assert again.defaults["num_inference_steps"] == 50
    found = again(2, torch.Generator().manual_seed(1), 4, output_type="np").images
    assert found.shape == (2, 16, 16, 3)
    assert abs(wanted - found).max() < 1e-4


def test_a_seed_is_a_picture_and_a_stream_shows_it() -> None:
    pipeline = quiet(UnconditionalPipeline(UNet2DModel(**UNET).eval(), scheduler_of()))
    images = pipeline(3, seed=5, **DRAW).images
    torch.testing.assert_close(pipeline(1, seed=6, **DRAW).images[0], images[1], atol=1e-5, rtol=0)
    shown = list(pipeline.stream(1, seed=5, num_inference_steps=4))
    assert [one.preview()[0].size for one in shown] == [(8, 8)] * 5
    assert shown[-1].output is not None
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="batch_size must be a whole number from 1"):
            pipeline(wrong)
    with pytest.raises(TypeError, match="unexpected argument 'seeds'; did you mean seed"):
        pipeline(1, seeds=1)


def test_classes_go_to_a_folder_and_back(tmp_path: Path) -> None:
    pipeline = classes()
    pipeline.save_pretrained(tmp_path)
    again = quiet(ClassConditionalPipeline.from_pretrained(tmp_path))
    assert type(again.classifier) is NoisyClassifier
    assert again.id2label == NAMES
    call = {"guidance_scale": 2.0, "classifier_scale": 2.0, "seed": 0, **DRAW}
    wanted = pipeline([0, 1], num_images_per_class=2, **call).images
    assert wanted.shape == (4, 3, 8, 8)
    assert torch.equal(again(["Kitten", "dog"], num_images_per_class=2, **call).images, wanted)
    torch.testing.assert_close(pipeline("dog", **{**call, "seed": 2}).images[0], wanted[2], atol=1e-5, rtol=0)


def test_what_the_unet_is_told() -> None:
    """Each of the ways to draw a class gives what the UNet, called by hand, gives."""
    pipeline = classes()
    x, t = torch.randn(1, 3, 8, 8), torch.tensor(99)
    label, null = torch.tensor([1]), torch.tensor([3])
    seen: list[Tensor] = []

    def prediction(**call: Any) -> Tensor:
        stream = pipeline.stream(1, num_inference_steps=1, latents=x, output_type="latent", **call)
        seen.append(next(stream).prediction)
        return seen[-1]

    pipeline.classifier, classifier = None, pipeline.classifier
    with torch.no_grad():
        told, untold = pipeline.unet(x, t, label).sample, pipeline.unet(x, t, null).sample
    torch.testing.assert_close(prediction(), told)
    mixed = untold + 3 * (told - untold)  # Ho & Salimans 2022, Eq. 6
    torch.testing.assert_close(prediction(guidance_scale=3.0), mixed, atol=1e-5, rtol=1e-5)
    pipeline.classifier = classifier
    leading = pipeline.classifier.log_probability_gradient(x, t, label)
    noise = (1 - pipeline.scheduler.alphas_cumprod[99]).sqrt()
    torch.testing.assert_close(prediction(classifier_scale=2.0), told - 2 * noise * leading)  # ADM, Alg. 2
    both = prediction(guidance_scale=3.0, classifier_scale=2.0)
    torch.testing.assert_close(both, mixed - 2 * noise * leading, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction(classifier_scale=0), told)
    assert len(seen) == 5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_all_predictions_are_shifted_to_the_same_picture(prediction: str) -> None:
    """What a shifted prediction says of the noise is the unshifted noise, less the gradient, whatever is predicted."""
    from latentdiff.pipelines.core.sampling import Sampler
    from latentdiff.pipelines.tasks.class_conditional import ClassifierGuidance

    process = GaussianDiffusion("cosine", 100, prediction)
    classifier = NoisyClassifier(**CLASSIFIER).eval()
    labels, t = torch.tensor([0, 2]), torch.tensor([40, 40])
    guide = ClassifierGuidance(classifier, labels, 1.5, Sampler(build_scheduler(process, "DDIMScheduler")))
    x, made = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    shifted = guide.change_prediction(made, x, 40)
    assert torch.equal(shifted[:, 3:], made[:, 3:])
    found = process.predict_noise(shifted[:, :3], t, x) - process.predict_noise(made[:, :3], t, x)
    noise = process.sqrt_one_minus_alphas_cumprod[40].float()
    gradient = classifier.log_probability_gradient(x, t, labels)
    torch.testing.assert_close(found, -1.5 * noise * gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_steps_have_their_mean_shifted_by_variance_times_gradient(variance: str) -> None:
    """ADM, Alg. 1, with the mean and the variance that the process gives."""
    unet = UNet2DModel(**UNET, num_class_embeds=3, out_channels=6 if variance == "learned_range" else 3).eval()
    pipeline = classes(scheduler_of(variance=variance), unet=unet)
    process = GaussianDiffusion("cosine", 100, variance_type=variance)
    x, t, label = torch.randn(1, 3, 8, 8), torch.tensor([60]), torch.tensor([2])
    with torch.no_grad():
        step = process.p_mean_variance(unet(x, t, label).sample, x, t)
    gradient = pipeline.classifier.log_probability_gradient(x, t, label)
    steps = {}
    for scale in (0.0, 5.0):
        call = {"classifier_scale": scale, "latents": x, "seed": 1, "timesteps": [60, 59], "output_type": "latent"}
        steps[scale] = next(pipeline.stream("bird", **call)).latents
    torch.testing.assert_close(steps[5.0] - steps[0.0], 5 * step.variance * gradient, atol=1e-6, rtol=1e-3)


class Brightness(torch.nn.Module):
    """Class 0 is dark, class 1 is bright."""

    dtype, device = torch.float32, torch.device("cpu")
    config = NoisyClassifier(**{**CLASSIFIER, "num_classes": 2}).config

    def log_probability_gradient(self, x: Tensor, timestep: Any, labels: Tensor) -> Tensor:
        return torch.ones_like(x) * (2 * labels[:, None, None, None] - 1)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_pictures_follow_a_classifier_with_any_sampler_and_a_unet_without_classes(name: str) -> None:
    pipeline = classes(
        scheduler_of(name), unet=UNet2DModel(**UNET).eval(), classifier=Brightness(), id2label={0: "dark", 1: "bright"}
    )
    call = {"seed": 0, "num_inference_steps": 10, "output_type": "latent"}
    dark = pipeline("dark", **call).images.mean()
    bright = pipeline("bright", **call).images.mean()
    assert bright > dark + 0.1
    assert pipeline("bright", **call, classifier_scale=3.0).images.mean() > bright + 0.1


def test_a_whole_name_comes_before_one_of_several() -> None:
    pipeline = classes(id2label={0: "cat", 1: "cat, black", 2: "crane, Black"}, classifier=None)
    assert pipeline.label_numbers(["cat", "CAT", "cat, black", "Crane"]) == [0, 0, 1, 2]
    with pytest.raises(ValueError, match=r"'black' is a name of several classes: 1 \(cat, black\), 2 \(crane, Black\)"):
        pipeline.label_numbers("black")
    twice = classes(id2label={0: "crane", 1: "dog", 2: "crane"}, classifier=None)
    with pytest.raises(ValueError, match=r"'crane' is a name of several classes: 0 \(crane\), 2 .*give the number"):
        twice("crane", **DRAW)
    assert classes(id2label={0: "Crane", 1: "dog", 2: "crane"}, classifier=None).label_numbers("crane") == [2]


def test_guidance_of_what_has_no_conditions_is_refused() -> None:
    pipeline = quiet(UnconditionalPipeline(UNet2DModel(**UNET).eval(), scheduler_of()))
    with pytest.raises(TypeError, match="unexpected argument 'guidance_interval'"):
        pipeline(1, guidance_interval=(0.1, 2.0), **DRAW)


def test_what_does_not_fit_is_refused() -> None:
    unet, other = UNet2DModel(**UNET), {**UNET, "num_class_embeds": 7}
    for changes, told in (
        ({"unet": unet, "classifier": None}, "no class embeddings .* and there is no classifier"),
        ({"unet": UNet2DModel(**other)}, "num_class_embeds=7 and there are 3 classes"),
        ({"classifier": NoisyClassifier(**{**CLASSIFIER, "num_classes": 5})}, "num_classes=5 and there are 3 classes"),
        ({"classifier": NoisyClassifier(**CLASSIFIER, in_channels=4)}, "takes 4 channels and the pixels have 3"),
        ({"id2label": {1: "a", 2: "b", 3: "c"}}, "id2label must name the classes from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=told):
            classes(**changes)
    pipeline = classes(unet=UNet2DModel(**UNET, num_class_embeds=3).eval())
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a UNet that was trained .*num_class_embeds=4"):
        pipeline("dog", guidance_scale=2.0, **DRAW)
    for label, told in (
        (3, "no class 3; they are numbered from 0 to 2"),
        ("brd", "did you mean 'bird'\\? There are bird, cat, kitten, dog"),
        ("cow", "there are bird, cat, kitten, dog"),
    ):
        with pytest.raises(ValueError, match=told):
            pipeline(label, **DRAW)
    with pytest.raises(ValueError, match="class_labels is empty"):
        pipeline([], **DRAW)
    with pytest.raises(ValueError, match="classifier_scale must be a number from 0"):
        pipeline("dog", classifier_scale=-1.0, **DRAW)
    with pytest.raises(ValueError, match="NoisyClassifier: it takes 8x8 and this is 12x16"):
        pipeline("dog", height=16, width=12, **DRAW)


def test_a_text_pipeline_does_not_take_a_unet_without_text(tmp_path: Path) -> None:
    from latentdiff import TextToImagePipeline

    UnconditionalPipeline(UNet2DModel(**UNET), scheduler_of()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its unet is a UNet2DModel; this pipeline takes UNet2DConditionModel"):
        TextToImagePipeline.from_pretrained(tmp_path)
