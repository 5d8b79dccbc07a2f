"""UNets with 2C channels: the prediction, and where each variance lies between the two fixed ones."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from latentdiff import TextToImagePipeline, UNet2DConditionModel
from latentdiff.diffusion import GaussianDiffusion, build_scheduler
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.scheduler_names import change_scheduler
from latentdiff.text import encode_prompts

CALL = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False, "seed": 0}
PROCESS = GaussianDiffusion("scaled_linear", variance_type="learned_range")


@pytest.fixture
def learned(pipeline: Any) -> TextToImagePipeline:
    """The tiny pipeline with a UNet whose first C channels are those of the plain one, and the DDPM scheduler."""
    plain = pipeline.unet
    config = {key: value for key, value in plain.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel(**config | {"out_channels": 8}).eval()
    torch.manual_seed(0)
    extra = {  # so little that the variances stay about the range between the fixed ones, as a trained network's
        name: torch.cat([value, 0.05 * torch.randn_like(value)]) if name.startswith("conv_out.") else value
        for name, value in plain.state_dict().items()
    }
    unet.load_state_dict(extra)
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
    new = TextToImagePipeline(**parts, unet=unet, scheduler=build_scheduler(PROCESS, "DDPMScheduler"))
    new.set_progress_bar_config(disable=True)
    return new


@pytest.mark.parametrize("name", ["ddim", "dpm++", "dpm++-single", "euler", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.filterwarnings("ignore")
def test_other_schedulers_draw_with_the_prediction_alone(
    pipeline: Any, learned: Any, name: str, guidance: float
) -> None:
    learned.scheduler = change_scheduler(learned.scheduler, name)
    pipeline.scheduler = build_scheduler(PROCESS, type(learned.scheduler).__name__)
    call = {**CALL, "guidance_scale": guidance, "guidance_rescale": 0.5}
    torch.testing.assert_close(learned("a red car", **call)[0], pipeline("a red car", **call)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ddpm_draws_with_the_learned_variances(learned: Any, guidance: float) -> None:
    """Against the process itself at all of its steps: guided mean, variance as with the prompt."""
    process = GaussianDiffusion("linear", 8, variance_type="learned_range", beta_start=0.02, beta_end=0.5)
    learned.scheduler = build_scheduler(process, "DDPMScheduler")
    latents, _ = learned(
        "a red car", **{**CALL, "num_inference_steps": 8, "guidance_scale": guidance, "guidance_rescale": 0.3}
    )

    generator = torch.Generator().manual_seed(0)
    x: Tensor = torch.randn(1, 4, 8, 8, generator=generator)
    guide = ClassifierFreeGuidance(guidance, 0.3)
    with torch.no_grad():
        positive, negative = encode_prompts(["a red car", ""], learned.tokenizer, learned.text_encoder).split(1)
        for t in reversed(range(8)):
            with_prompt = learned.unet(x, torch.tensor(t), positive).sample
            without = learned.unet(x, torch.tensor(t), negative).sample
            mean = guide(without[:, :4], with_prompt[:, :4]) if guidance > 1 else with_prompt[:, :4]
            step = process.p_mean_variance(torch.cat([mean, with_prompt[:, 4:]], dim=1), x, torch.tensor([t]))
            noise = torch.randn(x.shape, generator=generator) if t else torch.zeros_like(x)
            x = step.mean + (0.5 * step.log_variance).exp() * noise
    torch.testing.assert_close(latents, x, atol=2e-4, rtol=2e-4)


def test_the_variances_matter(learned: Any) -> None:
    one, _ = learned("a red car", **CALL)
    with torch.no_grad():
        learned.unet.conv_out.bias[4:] += 0.5
    other, _ = learned("a red car", **CALL)
    assert one.isfinite().all()
    assert (one - other).abs().max() > 1e-3


def test_saved_and_loaded(learned: Any, tmp_path: Any) -> None:
    learned.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.variance_type == "learned_range"
    torch.testing.assert_close(again("sun", **CALL)[0], learned("sun", **CALL)[0])


def test_what_does_not_fit_is_refused(pipeline: Any, learned: Any) -> None:
    pipeline.scheduler = learned.scheduler
    with pytest.raises(ValueError, match=r"gives 4 channels, without variances; .*variance_type='fixed_small'"):
        pipeline("a red car", **CALL)
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    pipeline.unet = UNet2DConditionModel(**config | {"out_channels": 6})
    with pytest.raises(ValueError, match="gives 6 channels; for latents with 4 it must be 4, or 8"):
        pipeline("a red car", **CALL)
    learned.scheduler = diffusers.DDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="'learned' is not supported"):
        learned("a red car", **CALL)
