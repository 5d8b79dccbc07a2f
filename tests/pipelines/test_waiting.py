"""The processor runs ahead of a GPU: nothing in a step reads what the device computes.

The device "meta" stands for a GPU. It has no values, so that reading one there is an error.
"""

from typing import Any

import diffusers
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff import UNet2DConditionModel
from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.pipelines.core.denoiser import GuidedDenoiser
from latentdiff.pipelines.core.sampling import Sampler, denoise

META = torch.device("meta")
SCHEDULERS = ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "PNDM", "HeunDiscrete", "LCM"]


class Waiting(TorchDispatchMode):
    """Counts copies to the device for which the processor waits until all before is done."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_to_copy" and args[0].device != META and options.get("device") == META:
            self.count += not options.get("non_blocking", False)
        if name == "copy_" and args[0].device == META and args[1].device != META:
            self.count += not (args[2] if len(args) > 2 else options.get("non_blocking", False))
        return func(*args, **options)


@pytest.mark.parametrize("scale", [5.0, (5.0, 2.0)])
@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()  # under which copies are seen, as within torch.inference_mode they are not
def test_no_step_waits_for_the_device(name: str, scale: Any) -> None:
    with META:
        unet = UNet2DConditionModel(**tiny.UNET)
        latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    sampler = Sampler(getattr(diffusers, f"{name}Scheduler")())
    both = GuidedConditioning(Conditioning(states=states), Conditioning(states=states))
    denoiser = GuidedDenoiser(unet, both, ClassifierFreeGuidance(scale, 0.5, interval=(0.01, 100.0)))
    timesteps = sampler.plan(4, META)
    steps = denoise(denoiser, sampler, latents, timesteps)
    first = next(steps).latents
    with Waiting() as waiting:
        last = list(steps)[-1].latents
    assert first.device == last.device == META
    assert waiting.count == 0
