"""Our networks and pipeline against diffusers', with the same weights, in one process and in turn.

    python benchmarks/side_by_side.py            # the packaged model
    python benchmarks/side_by_side.py --model runs/mine --repeats 9
    python benchmarks/side_by_side.py --sdxl

Prints the median time of each, the ratio theirs / ours (above 1: ours is faster), and the share of this machine's
measured matrix-multiply rate that each reaches. Run it on a quiet machine: with another busy process on the same
cores, small kernels become many times slower and the ratios mean nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from gpu_networks import SDXL as RELEASED
from torch.utils.flop_counter import FlopCounterMode

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel
from latentdiff.conditioning import Conditioning
from latentdiff.interchange.folders import packaged_model

Work = Callable[[], Any]


def matrix_multiply_rate(size: int = 2048, seconds: float = 2.0) -> float:
    """Floating-point operations per second of a large float32 matrix product: the best of many."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def in_turn(ours: Work, theirs: Work, repeats: int) -> tuple[float, float, float]:
    """Median seconds of ours and theirs, run alternately, and the median of the ratios pair by pair."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    mine, other = zip(*pairs, strict=True)
    return statistics.median(mine), statistics.median(other), statistics.median(b / a for a, b in pairs)


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def operations(work: Work) -> int:
    """Floating-point operations of matrix products, convolutions and attention in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def networks(model: str, batch: int) -> dict[str, tuple[Work, Work]]:
    """The steps to time: name -> (ours, theirs). The inputs are the same tensors."""
    parts: dict[str, tuple[Any, Any]] = {}
    for name, ours_class in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        theirs_class = getattr(diffusers, ours_class.__name__)
        loaded = [
            c.from_pretrained(model, subfolder=name, torch_dtype=torch.float32) for c in (ours_class, theirs_class)
        ]
        parts[name] = (loaded[0].eval(), loaded[1].eval())
    unet, their_unet = parts["unet"]
    vae, their_vae = parts["vae"]
    size, channels = unet.config.sample_size, unet.config.in_channels
    latents = torch.randn(batch, channels, size, size)
    text = torch.randn(batch, 32, unet.config.cross_attention_dim)
    timestep = torch.tensor(500)
    time_embedding, context = unet.embed_time(timestep), unet.encode_text(text)  # the pipeline makes these once

    pixels = vae.decode(latents).sample
    return {
        f"UNet, plain call, batch {batch}": (
            lambda: unet(latents, timestep, text).sample,
            lambda: their_unet(latents, timestep, text).sample,
        ),
        f"UNet step in the loop, batch {batch}": (
            lambda: unet.denoise(latents, time_embedding, context),
            lambda: their_unet(latents, timestep, text).sample,
        ),
        f"VAE decode, batch {batch}": (lambda: vae.decode(latents).sample, lambda: their_vae.decode(latents).sample),
        f"VAE encode, batch {batch}": (
            lambda: vae.encode(pixels).latent_dist.mean,
            lambda: their_vae.encode(pixels).latent_dist.mean,
        ),
    }


SDXL: dict[str, Any] = {
    **RELEASED,
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 512,
    "addition_time_embed_dim": 64,
    "projection_class_embeddings_input_dim": 320 + 6 * 64,
}
"""SDXL's UNet, a fifth as wide."""


def narrow_sdxl(batch: int) -> dict[str, tuple[Work, Work]]:
    """The steps of a UNet of SDXL's shape, with random weights."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**SDXL).eval()
    ours = UNet2DConditionModel(**SDXL).eval()
    ours.load_state_dict(theirs.state_dict())
    latents, timestep = torch.randn(batch, 4, 32, 32), torch.tensor(500)
    states, pooled, sizes = torch.randn(batch, 77, 512), torch.randn(batch, 320), torch.full((batch, 6), 256.0)
    added = {"text_embeds": pooled, "time_ids": sizes}
    prepared = ours.prepare(Conditioning(states, pooled=pooled, time_ids=sizes))
    return {
        f"SDXL, plain call, batch {batch}": (
            lambda: ours(latents, timestep, states, added_cond_kwargs=added).sample,
            lambda: theirs(latents, timestep, states, added_cond_kwargs=added).sample,
        ),
        f"SDXL step in the loop, batch {batch}": (
            lambda: ours.denoise(latents, ours.embed_time(timestep), prepared),
            lambda: theirs(latents, timestep, states, added_cond_kwargs=added).sample,
        ),
    }


def pipelines(model: str, steps: int, guidance_scale: float) -> tuple[Work, Work]:
    """Whole pipelines, prompt to picture: (ours, theirs)."""
    pair = [
        TextToImagePipeline.from_pretrained(model),
        diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32),
    ]
    for pipeline in pair:
        pipeline.set_progress_bar_config(disable=True)

    def run(pipeline: Any) -> Work:
        return lambda: pipeline(
            "a red car",
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )

    return run(pair[0]), run(pair[1])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="pipeline folder; default: the packaged model")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--sdxl", action="store_true", help="a narrow UNet of SDXL's shape instead, random weights")
    arguments = parser.parse_args()
    model = arguments.model or str(packaged_model())

    rate = matrix_multiply_rate()
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, float32")
    print(f"matrix multiply: {rate / 1e9:.0f} GFLOP/s\n")
    print(f"{'':32}{'ours':>10}{'diffusers':>11}{'ratio':>8}{'ours':>8}{'theirs':>8}  of the matrix-multiply rate")
    if arguments.sdxl:
        jobs = {**narrow_sdxl(batch=1), **narrow_sdxl(batch=2)}
    else:
        jobs = {**networks(model, batch=2), **networks(model, batch=8)}
        jobs[f"pipeline, {arguments.steps} steps, guided"] = pipelines(model, arguments.steps, 4.0)
        jobs["pipeline, 4 steps, not guided"] = pipelines(model, 4, 1.0)
    for name, (ours, theirs) in jobs.items():
        mine, other, ratio = in_turn(ours, theirs, arguments.repeats)
        work = operations(ours), operations(theirs)
        shares = work[0] / mine / rate, work[1] / other / rate
        print(f"{name:32}{mine * 1e3:>8.1f}ms{other * 1e3:>9.1f}ms{ratio:>8.2f}{shares[0]:>8.0%}{shares[1]:>8.0%}")


if __name__ == "__main__":
    main()
