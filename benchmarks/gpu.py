"""Drawing and training on a GPU beside diffusers, with the same random weights, in one process and in turn.

    python benchmarks/gpu.py results --seconds 300 --script train_text_to_image.py
    python benchmarks/gpu.py results --seconds 120 --device cpu --tiny          # rehearses it

The most important is measured first, and `results` holds measured.json and table.md after every row, so that a run
which is cut short leaves what it has. What does not fit into the time or the memory that is left is passed over and
named.

Pictures are of 512x512 pixels in 20 steps of DDIM with guidance, from prompt to pixels; a step is one call of the UNet
with both sides of guidance, as each pipeline makes it within its loop. Peak memory is torch's, weights included.
Training steps are those of ``latentdiff finetune --method full`` and of diffusers' script (see
training_side_by_side.py), each in a process of its own.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import training_side_by_side as training
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff import AutoencoderKL, TextToImagePipeline, UNet2DConditionModel
from latentdiff.memory import is_lack_of_memory

Work = Callable[[], Any]
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
WAYS: dict[str, tuple[str, float]] = {  # what is done to a UNet, and seconds that it takes beforehand, of both
    "eager": ("", 0),
    "channels-last, repeated blocks compiled": ("blocks", 40),
    "CUDA graphs": ("cudagraphs", 40),
    "channels-last, compiled": ("inductor", 150),
    "channels-last, compiled, CUDA graphs": ("reduce-overhead", 150),
}
MIB = 2**20


class Report:
    """Rows, written down whenever there is a new one.

    Attributes:
        left: seconds that remain.
    """

    def __init__(self, folder: Path, seconds: float, device: torch.device) -> None:
        self.folder, self.end, self.device = folder, time.monotonic() + seconds, device
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "processor (a rehearsal)"
        self.head = f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}"
        self.write()

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        found = {"where": self.head, "rows": self.rows}
        (self.folder / "measured.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
        lines = [self.head, ""]
        for what in dict.fromkeys(row["what"] for row in self.rows):
            rows = [row for row in self.rows if row["what"] == what]
            names = list(dict.fromkeys(name for row in rows for name in row if name != "what"))
            lines += [f"## {what}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
            lines += ["| " + " | ".join(shown(row.get(name)) for name in names) + " |" for row in rows]
            lines.append("")
        (self.folder / "table.md").write_text("\n".join(lines), encoding="utf-8")

    def measure(self, least: float, fill: Callable[[dict[str, Any]], None], **row: Any) -> None:
        """Add a row that `fill` completes; it says so if time or memory do not suffice.

        least: seconds that it needs on a GPU.
        """
        least = least if self.device.type == "cuda" else 0
        try:
            if self.left < least:
                row["note"] = f"no time left (it needs {least:.0f} s)"
            else:
                fill(row)
        except Exception as error:
            row["note"] = "does not fit into memory" if is_lack_of_memory(error) else f"failed: {error!r}"[:300]
        except SystemExit as error:  # of a training
            row["note"] = f"failed: {error}"[-600:]
        self.add(**row)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def shown(value: Any) -> str:
    return (
        ""
        if value is None
        else f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


class Timer:
    """Times work on a device, and takes its peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @torch.inference_mode()
    def seconds(self, work: Work) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    @torch.inference_mode()
    def peak(self, work: Work) -> float:
        """MiB, weights included; 0 on a processor."""
        if not self.cuda:
            work()
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB

    def in_turn(self, works: dict[str, Work], repeats: int) -> dict[str, float]:
        """Median seconds of each, run alternately; each has run before, in `peak` or twice here."""
        for work in works.values():
            self.seconds(work)
        found = {name: [self.seconds(work) for _ in range(1)] for name, work in works.items()}
        for _ in range(repeats - 1):
            for name, work in works.items():
                found[name].append(self.seconds(work))
        return {name: statistics.median(times) for name, times in found.items()}


class Pair:
    """Our pipeline and diffusers', which share their weights.

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
        self.device, self.dtype = device, dtype
        for pipeline in (self.ours, self.theirs):
            pipeline.set_progress_bar_config(disable=True)

    def pictures(self, batch: int, steps: int) -> dict[str, Work]:
        """From prompts to pixels."""

        def draw(pipeline: Any) -> Any:
            generator = torch.Generator(self.device).manual_seed(0)
            return pipeline(
                ["a red car"] * batch, num_inference_steps=steps, generator=generator, output_type="pt",
                height=self.pixels, width=self.pixels, guidance_scale=7.5,
            ).images  # fmt: skip

        return {"diffusers": lambda: draw(self.theirs), "ours": lambda: draw(self.ours)}

    def steps(self, batch: int) -> dict[str, Work]:
        """One call of each UNet as its pipeline makes it in the loop."""
        unet, other = self.ours.unet, self.theirs.unet
        options = {"device": self.device, "dtype": self.dtype}
        latents = torch.randn(2 * batch, 4, self.pixels // 8, self.pixels // 8, **options)
        states = torch.randn(2 * batch, 77, other.config.cross_attention_dim, **options)
        timestep = torch.tensor(500, device=self.device)
        with torch.inference_mode():
            context = unet.encode_text(states)
        return {
            "diffusers": lambda: other(latents, timestep, encoder_hidden_states=states, return_dict=False)[0],
            "ours": lambda: unet.denoise(latents, unet.embed_time(timestep), context),
        }

    def change(self, way: str) -> None:
        """Make both UNets as `way` says; of the result only pictures can be drawn."""
        for pipeline in (self.ours, self.theirs):
            unet: nn.Module = pipeline.unet
            if way != "cudagraphs":
                unet.to(memory_format=torch.channels_last)
                pipeline.vae.to(memory_format=torch.channels_last)
            if way == "blocks":
                unet.compile_repeated_blocks()
            elif way == "inductor":
                pipeline.unet = torch.compile(unet)
            elif way == "reduce-overhead":
                pipeline.unet = torch.compile(unet, mode=way)
            else:
                pipeline.unet = torch.compile(unet, backend=way)


def beside(row: dict[str, Any], times: dict[str, float], peaks: dict[str, float] | None = None) -> None:
    """Fill a row with the times of both, their ratio and their memory."""
    for who in ("diffusers", "ours"):
        row[f"{who}, ms"] = 1e3 * times[who]
    row["ratio"] = times["diffusers"] / times["ours"]
    for who, peak in (peaks or {}).items():
        row[f"{who}, peak MiB"] = peak


def draw(report: Report, size: str, precision: str, batches: tuple[int, ...], way: str, options: Any) -> None:
    """Rows of pictures, and where nothing is compiled of steps, for each batch size."""
    timer, (change, seconds) = Timer(report.device), WAYS[way]
    on_gpu = report.device.type == "cuda"
    if report.left < seconds + 5 or (not on_gpu and change not in ("", "blocks")):
        report.add(what="pictures", model=size, precision=precision, way=way, note="no time left")
        return
    pair = Pair(size, report.device, DTYPES[precision], options.tiny)
    if change and on_gpu:
        pair.change(change)

    def pictures(row: dict[str, Any]) -> None:
        before = time.monotonic()
        works = pair.pictures(row["batch"], options.steps)
        peaks = {name: timer.peak(work) for name, work in works.items()}
        row["first calls, s"] = time.monotonic() - before
        beside(row, timer.in_turn(works, options.repeats), peaks)

    def steps(row: dict[str, Any]) -> None:
        beside(row, timer.in_turn(pair.steps(row["batch"]), 4 * options.repeats))

    for batch in batches:
        what = {"model": size, "precision": precision, "batch": batch, "way": way}
        report.measure(seconds + 2 + batch, pictures, what="pictures", **what)
        if not change:
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


def train(report: Report, options: Any) -> None:
    """Training steps beside diffusers' script: ours with the cache, theirs, ours without."""
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
            command = training.theirs(*shared) if row["who"] == "diffusers" else training.ours(*shared, cached)
            found = training.measure(command, place, stop=given.steps, timeout=max(report.left, 1))
            base.append(found["steps_per_second"])
            row |= {"steps/s": base[-1], "times diffusers": base[-1] / base[0]}
            row |= {name: found[name] for name in ("loss", "loss_error", "gpu_memory_mib", "seconds_in_all")}

        for who in ("diffusers", "ours, cached", "ours, not cached"):
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
    draw(report, first, "float16", (1, 4, 8), "eager", options)
    train(report, options)
    decode(report, "float16", options)
    draw(report, first, "float16", (1,), "CUDA graphs", options)
    draw(report, first, "float16", (1, 4), "channels-last, repeated blocks compiled", options)
    draw(report, second, "float16", (1, 4, 8), "eager", options)
    draw(report, first, "bfloat16", (1, 4, 8), "eager", options)
    draw(report, first, "float16", (1, 4), "channels-last, compiled", options)
    draw(report, second, "bfloat16", (1, 4, 8), "eager", options)
    draw(report, first, "float16", (1,), "channels-last, compiled, CUDA graphs", options)


if __name__ == "__main__":
    main()
