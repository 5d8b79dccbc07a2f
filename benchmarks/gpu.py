"""Drawing and training on a GPU beside diffusers, with the same random weights, in one process and in turn.

    python benchmarks/gpu.py results --seconds 300 --script train_text_to_image.py
    python benchmarks/gpu.py results --seconds 120 --device cpu --tiny          # rehearses it

The most important is measured first, and `results` holds measured.json and table.md after every row, so that a run
which is cut short leaves what it has. What does not fit into the time or the memory that is left is passed over and
named.

Pictures are of 512x512 pixels in 20 steps of DDIM with guidance, from prompt to pixels; a step is one call of the UNet
with both sides of guidance, as each pipeline makes it within its loop. "Optimized" is what ``pipeline.optimize()``
chooses on a GPU, a step as one CUDA graph. Steps are so also those of SDXL, its refiner, DiT and
PixArt, of the released sizes. Codes are drawn beside a GPT-2 of transformers. Peak memory is torch's, weights included.
Training steps are those of ``latentdiff finetune --method full`` and of diffusers' script (see
training_side_by_side.py), each in a process of its own.
"""

import argparse
import copy
import functools
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import tokens
import torch
import training_side_by_side as training
from gpu_networks import NETWORKS, Networks
from gpu_report import Report, Timer, Work, beside
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel
from latentdiff.pipelines.core.step_runner import StepRunner, network_state

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SMALL = {"block_out_channels": (16, 16, 16, 16), "attention_head_dim": 4, "norm_num_groups": 8}
SIZES: dict[str, tuple[dict[str, Any], int]] = {  # UNet, layers of the text encoder
    "Stable Diffusion 1.5": (SD15, 12),
    "Stable Diffusion 2.1": (SD21, 23),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
COMPILING = 120  # seconds that it takes to compile a UNet, about


class Pair:
    """Our pipeline, as it is and as `optimize` makes it, and diffusers', all of which share their weights.

    Args:
        size: a name in SIZES.
        tiny: a few weights in its place.
    """

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype, tiny: bool) -> None:
        config, layers = SIZES[size]
        unet, vae = {**config, **(SMALL if tiny else {})}, dict(VAE)
        self.pixels = 32 if tiny else 512
        if tiny:
            vae |= {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
            unet |= {"sample_size": 4}
        width = unet["cross_attention_dim"]
        text = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
            num_hidden_layers=2 if tiny else layers,
        )  # fmt: skip
        torch.manual_seed(0)
        with device:
            networks = [UNet2DConditionModel(**unet), AutoencoderKL(**vae)]
            encoder = CLIPTextModel(text).to(dtype).eval().requires_grad_(False)
        with torch.device("meta"):
            theirs = [diffusers.UNet2DConditionModel(**unet), diffusers.AutoencoderKL(**vae)]
        for ours, other in zip(networks, theirs, strict=True):
            nn.Module.to(ours, dtype=dtype)  # diffusers' own warns
            ours.eval().requires_grad_(False)
            other.load_state_dict(ours.state_dict(), assign=True)
            other.eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = training.clip_tokenizer(Path(folder))
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        )
        parts = {"text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}
        self.ours = TextToImagePipeline(vae=networks[1], unet=networks[0], **parts)
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self.theirs = diffusers.StableDiffusionPipeline(vae=theirs[1], unet=theirs[0], **parts, **none)
        self.optimized = copy.copy(self.ours)  # as `optimize` does on a GPU
        self.optimized.step_runner = StepRunner(compiled=False, graphs=True)
        self.device, self.dtype = device, dtype
        for pipeline in (self.ours, self.optimized, self.theirs):
            pipeline.set_progress_bar_config(disable=True)

    def pictures(self, batch: int, steps: int) -> dict[str, Work]:
        """From prompts to pixels."""

        def draw(pipeline: Any) -> Any:
            generator = torch.Generator(self.device).manual_seed(0)
            return pipeline(
                ["a red car"] * batch, num_inference_steps=steps, generator=generator, output_type="pt",
                height=self.pixels, width=self.pixels, guidance_scale=7.5,
            ).images  # fmt: skip

        pipelines = {"diffusers": self.theirs, "ours": self.ours, "ours, optimized": self.optimized}
        return {who: functools.partial(draw, pipeline) for who, pipeline in pipelines.items()}

    def steps(self, batch: int) -> dict[str, Work]:
        """One call of each UNet as its pipeline makes it in the loop."""
        unet, other = self.ours.unet, self.theirs.unet
        options = {"device": self.device, "dtype": self.dtype}
        latents = torch.randn(2 * batch, 4, self.pixels // 8, self.pixels // 8, **options)
        states = torch.randn(2 * batch, 77, other.config.cross_attention_dim, **options)
        timestep = torch.tensor(500, device=self.device)
        with torch.inference_mode():
            context = unet.encode_text(states)
        runner, state = self.optimized.step_runner, network_state(unet)
        return {
            "diffusers": lambda: other(latents, timestep, encoder_hidden_states=states, return_dict=False)[0],
            "ours": lambda: unet.denoise(latents, unet.embed_time(timestep), context),
            "ours, optimized": lambda: runner(unet, state, latents, unet.embed_time(timestep), context),
        }

    def compile(self) -> None:
        """Make both channels-last and compile their UNets, ours as ``optimize(compiled=True)`` does."""
        for pipeline in (self.ours, self.theirs):
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        self.theirs.unet = torch.compile(self.theirs.unet)
        self.optimized.step_runner = StepRunner(compiled=True, graphs=True)


def draw(
    report: Report, size: str, precision: str, batches: tuple[int, ...], options: Any, compiled: bool = False
) -> None:
    """Rows of pictures, and where nothing is compiled of steps, for each batch size."""
    timer, seconds = Timer(report.device), 2 * COMPILING if compiled else 0
    if report.left < seconds + 5 or (compiled and report.device.type != "cuda"):
        report.add(what="pictures", model=size, precision=precision, compiled=compiled, note="no time left")
        return
    pair = Pair(size, report.device, DTYPES[precision], options.tiny)
    if compiled:
        pair.compile()

    def pictures(row: dict[str, Any]) -> None:
        before = time.monotonic()
        works = pair.pictures(row["batch"], options.steps)
        if compiled:  # ours is what is not optimized
            works["ours"] = works.pop("ours, optimized")
        peaks = {name: timer.peak(work) for name, work in works.items()}
        row["first calls, s"] = time.monotonic() - before
        beside(row, timer.in_turn(works, options.repeats), peaks)

    def steps(row: dict[str, Any]) -> None:
        beside(row, timer.in_turn(pair.steps(row["batch"]), 4 * options.repeats))

    for batch in batches:
        what = {"model": size, "precision": precision, "batch": batch, "compiled": compiled}
        report.measure(seconds + 2 + batch, pictures, what="pictures", **what)
        if not compiled:
            report.measure(2, steps, what="steps of the UNet", **what)


def decode(report: Report, precision: str, options: Any) -> None:
    """Time and memory of decoding eight pictures at once: whole, one by one, and in tiles."""
    pair, timer = Pair("Stable Diffusion 1.5", report.device, DTYPES[precision], options.tiny), Timer(report.device)
    latents = torch.randn(8, 4, pair.pixels // 8, pair.pixels // 8, device=report.device, dtype=pair.dtype)
    works: dict[str, Work] = {
        "diffusers": lambda: pair.theirs.vae.decode(latents).sample,
        "ours": lambda: pair.ours.vae.decode(latents).sample,
    }

    def fill(row: dict[str, Any]) -> None:
        for vae in (pair.ours.vae, pair.theirs.vae):
            (vae.enable_slicing if row["way"] == "slices" else vae.disable_slicing)()
            (vae.enable_tiling if row["way"] == "tiles" else vae.disable_tiling)()
        peaks = {name: timer.peak(work) for name, work in works.items()}
        beside(row, timer.in_turn(works, options.repeats), peaks)

    for way in ("whole", "slices", "tiles"):
        report.measure(5, fill, what="decoding 8 pictures", precision=precision, way=way)


def step(report: Report, name: str, precision: str, batches: tuple[int, ...], options: Any) -> None:
    """Rows of guided steps of one of `NETWORKS`, for each batch size."""
    made: list[Networks] = []

    def fill(row: dict[str, Any]) -> None:
        if not made:
            made.append(Networks(name, report.device, DTYPES[precision], options.tiny))
        timer, works = Timer(report.device), made[0].steps(row["batch"])
        peaks = {who: timer.peak(work) for who, work in works.items()}
        beside(row, timer.in_turn(works, 4 * options.repeats), peaks)

    for batch in batches:
        report.measure(15, fill, what="guided steps", model=name, precision=precision, batch=batch)


def code(report: Report, precision: str, batch: int, options: Any) -> None:
    """A row of drawing 16x16 codes, beside transformers' ``generate`` on a GPT-2 of the same size."""

    def fill(row: dict[str, Any]) -> None:
        sizes = (2, 2, 4, 16) if options.tiny else (24, 16, 16, 16384)
        both = (network.to(report.device, DTYPES[precision]) for network in tokens.models(*sizes))
        works = tokens.ways(*both, batch)
        timer, pair = Timer(report.device), {"diffusers": works["transformers"], "ours": works["latentdiff"]}
        beside(row, timer.in_turn(pair, options.repeats))
        row["transformers, ms"] = row.pop("diffusers, ms")
        row["ours, times transformers"] = row.pop("ours, times diffusers")

    report.measure(60, fill, what="drawing codes", model="350M parameters", precision=precision, batch=batch)


def train(report: Report, options: Any) -> None:
    """Training steps beside diffusers' script: ours with the cache and without, and theirs with one."""
    if options.script is None or report.left < 60:
        report.add(what="training steps", note="needs --script and a minute")
        return
    given = argparse.Namespace(
        script=options.script.resolve(), batch=options.train_batch, steps=options.train_steps, learning_rate=1e-5,
        precision="no" if report.device.type == "cpu" else "bf16", workers=0 if options.tiny else 4,
    )  # fmt: skip
    base: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        pair = Pair("Stable Diffusion 1.5", report.device, torch.float32, options.tiny)
        pair.ours.save_pretrained(root / "model")
        side = pair.pixels
        del pair
        gc.collect()
        if report.device.type == "cuda":
            torch.cuda.empty_cache()
        training.make_pictures(root / "pictures", 4 * given.batch, 2 * side)

        def fill(row: dict[str, Any]) -> None:
            place = root / row["who"]
            place.mkdir()
            shared = (root / "model", root / "pictures", place / "out", side, given)
            cached = row["who"] == "ours, cached"
            if row["who"] == "diffusers":
                command = training.theirs(*shared)
            elif row["who"] == "diffusers, cached":
                command = training.peer(root / "model", root / "pictures", side, given)
            else:
                command = training.ours(*shared, cached)
            found = training.measure(command, place, stop=given.steps, timeout=max(report.left, 1))
            base.append(found["steps_per_second"])
            row |= {"steps/s": base[-1], "times diffusers": base[-1] / base[0]}
            row |= {name: found[name] for name in ("loss", "loss_error", "gpu_memory_mib", "seconds_in_all")}

        for who in ("diffusers", "ours, cached", "diffusers, cached", "ours, not cached"):
            what = {"batch": given.batch, "precision": given.precision, "who": who}
            report.measure(40, fill, what="training steps", **what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for measured.json and table.md")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of a few weights, to rehearse")
    parser.add_argument("--script", type=Path, help="diffusers' train_text_to_image.py; without it nothing is trained")
    parser.add_argument("--steps", type=int, default=20, help="of a picture")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=30)
    parser.add_argument("--train-batch", type=int, default=8)
    options = parser.parse_args()
    report = Report(options.results, options.seconds, torch.device(options.device))
    first, second = SIZES
    draw(report, first, "float16", (1, 4, 8), options)
    train(report, options)
    decode(report, "float16", options)
    for name in NETWORKS:
        step(report, name, "float16", (1, 4), options)
    draw(report, second, "float16", (1, 4, 8), options)
    draw(report, first, "bfloat16", (1, 4, 8), options)
    code(report, "bfloat16", 8, options)
    draw(report, first, "float16", (8, 1), options, compiled=True)
    draw(report, second, "bfloat16", (1, 4, 8), options)


if __name__ == "__main__":
    main()
