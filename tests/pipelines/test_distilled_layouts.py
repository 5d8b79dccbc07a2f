"""Models that were distilled to few steps draw what diffusers draws with them, from folders and LoRAs as on the hub."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compare import largest_difference
from PIL import Image
from safetensors.torch import save_file
from tiny import UNET, VAE

from latentdiff import ImageToImagePipeline, TextToImagePipeline
from latentdiff.pipelines.core.sampling import Sampler
from latentdiff.pipelines.core.scheduler_names import change_scheduler

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers brings old scheduler configs up to date

BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAILING: dict[str, Any] = {**BETAS, "timestep_spacing": "trailing"}
EMBEDDED = {"time_cond_proj_dim": 12}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {  # scheduler, and what the UNet has more
    "turbo": (lambda: diffusers.EulerDiscreteScheduler(**TRAILING, steps_offset=1), {}),
    "turbo-ancestral": (lambda: diffusers.EulerAncestralDiscreteScheduler(**TRAILING), {}),
    "lightning-one-step": (lambda: diffusers.EulerDiscreteScheduler(**TRAILING, prediction_type="sample"), {}),
    "hyper": (lambda: diffusers.DDIMScheduler(**TRAILING, clip_sample=False, set_alpha_to_one=False), {}),
    "tcd": (lambda: diffusers.TCDScheduler(**BETAS), {}),
    "lcm-lora": (lambda: diffusers.LCMScheduler(**BETAS), {}),
    "lcm": (lambda: diffusers.LCMScheduler(**BETAS), EMBEDDED),
    "lcm-v": (lambda: diffusers.LCMScheduler(**BETAS, prediction_type="v_prediction"), EMBEDDED),
}
NO_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")


@pytest.fixture
def loaded(clip: dict[str, Any], tmp_path: Path) -> Any:
    """A folder as diffusers saves it, loaded by our class and by diffusers'."""

    def load(scheduler: Any, **unet: Any) -> tuple[Any, Any]:
        torch.manual_seed(3)
        parts = {"unet": diffusers.UNet2DConditionModel(**{**UNET, **unet}), "vae": diffusers.AutoencoderKL(**VAE)}
        diffusers.StableDiffusionPipeline(**parts, **clip, scheduler=scheduler, **NO_CHECKER).save_pretrained(tmp_path)
        return quiet(
            TextToImagePipeline.from_pretrained(tmp_path), diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
        )

    return load


def quiet(*pipelines: Any) -> Any:
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_diffusers(loaded: Any, layout: str) -> None:
    scheduler, unet = LAYOUTS[layout]
    ours, theirs = loaded(scheduler(), **unet)
    again = quiet(ImageToImagePipeline.from_pipe(ours), diffusers.StableDiffusionImg2ImgPipeline.from_pipe(theirs))
    assert type(ours.scheduler) is type(theirs.scheduler)
    scale = 8.5 if unet else 0.0  # embedded, or off as these models' cards have it
    most = 4e-6 if layout == "lightning-one-step" else 1e-6  # a random network's pictures are far beyond [-1, 1]
    for steps in (1, 2, 4, 8):
        call = {"prompt": ["a red car", "sun"], "guidance_scale": scale, "num_inference_steps": steps}
        assert largest_difference(ours, theirs, **call) < most
        if steps in (2, 8):
            assert largest_difference(*again, image=PICTURE, strength=0.5, **call) < most
    assert largest_difference(ours, theirs, prompt="sun", num_inference_steps=2, eta=0.3, guidance_scale=1.5) < 2e-5


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_own_timesteps_are_diffusers(loaded: Any, name: str) -> None:
    """As the cards of one-step models have it: ``timesteps=[800]``."""
    ours, theirs = loaded(LAYOUTS[name][0]())
    call = {"prompt": "a red car", "guidance_scale": 0.0, "num_inference_steps": None, "timesteps": [800]}
    assert largest_difference(ours, theirs, **call) < 1e-6


def lcm_lora(unet: Any, file: Path) -> Path:
    """A LoRA as LCM-LoRA is laid out: kohya's names of the UNet's layers alone, one rank, alphas, half precision."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "_blocks." in name:
            out, *inputs = module.weight.shape
            flat = f"lora_unet_{name.replace('.', '_')}"
            up = torch.randn(out, 4, *(1,) * (len(inputs) - 1), generator=generator)
            state |= {
                f"{flat}.alpha": torch.tensor(2.0).half(),
                f"{flat}.lora_down.weight": (torch.randn(4, *inputs, generator=generator) * 0.2).half(),
                f"{flat}.lora_up.weight": (up * 0.2).half(),
            }
    save_file(state, file)
    return file


def test_an_lcm_lora_on_a_plain_model(loaded: Any, tmp_path: Path) -> None:
    ours, theirs = loaded(diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1))
    call = {"prompt": "a red car", "guidance_scale": 1.0}
    plain = ours(**call, num_inference_steps=4, seed=0, output_type="pt").images
    file = lcm_lora(theirs.unet, tmp_path / "pytorch_lora_weights.safetensors")
    report = ours.load_lora_weights(file)
    theirs.load_lora_weights(str(file))
    assert not report.unmatched
    assert (ours(**call, num_inference_steps=4, seed=0, output_type="pt").images - plain).abs().max() > 1e-3
    for name in ("lcm", "tcd"):
        ours.scheduler = change_scheduler(ours.scheduler, name)
        theirs.scheduler = type(ours.scheduler).from_config(theirs.scheduler.config)
        assert ours.scheduler.config.timestep_spacing == theirs.scheduler.config.timestep_spacing
        for steps in (1, 4):
            assert largest_difference(ours, theirs, **call, num_inference_steps=steps) < 1e-6


@pytest.mark.parametrize("name", ["euler-ancestral", "kdpm2", "kdpm2-ancestral", "pndm"])
def test_a_scheduler_that_knows_no_predicted_pictures_is_refused_before_it_draws(name: str) -> None:
    one_step = LAYOUTS["lightning-one-step"][0]()
    with pytest.raises(ValueError, match=r"cannot draw with a model whose prediction_type is 'sample'; ddim, "):
        change_scheduler(one_step, name)
    for able in ("ddim", "dpm++", "euler", "lcm", "tcd", "unipc"):
        assert change_scheduler(one_step, able).config.prediction_type == "sample"


def test_a_plan_that_a_scheduler_does_not_have_is_refused() -> None:
    sampler = Sampler.of(diffusers.PNDMScheduler(**TRAILING))
    with pytest.raises(ValueError, match=r"the PNDMScheduler cannot plan num_inference_steps=2 .*; give more steps"):
        sampler.plan(2, torch.device("cpu"))


@pytest.mark.parametrize("name", ["lcm", "tcd", "euler"])
def test_another_scheduler_is_of_the_same_process(name: str) -> None:
    """Also where the first was made with its class's own betas, which LCM's and TCD's classes have others of."""
    ddpm = diffusers.DDPMScheduler()
    changed = change_scheduler(ddpm, name)
    assert torch.equal(changed.alphas_cumprod, ddpm.alphas_cumprod)
