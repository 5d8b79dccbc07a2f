"""Fine-tuning beside diffusers' ``train_text_to_image.py``: steps per second, peak memory and loss, in one run.

    python benchmarks/training_side_by_side.py results --script train_text_to_image.py

The script is ``examples/text_to_image/train_text_to_image.py`` of diffusers' repository, unchanged. Both train the same
UNet from the same weights on the same pictures with the same settings, each in a process of its own, in turn: ours with
the cache, theirs, theirs with latents and text states computed beforehand (`cached_peer.py`, as sd-scripts does), ours
without the cache. Without ``--script`` only those with a cache. Run it on a quiet machine.

Rounds are made until ``--repeats`` or ``--minutes`` are over; what is encoded beforehand is encoded in the first round.
After every training ``results/table.md`` and ``results/measured.json`` hold what there is, however the run ends: the
medians of all rounds.

Models (``--model``), made here with random weights (the time does not depend on them):
  sd     Stable Diffusion 1's own autoencoder and text encoder with a UNet of 29M parameters, at 128x128
  tiny   all small, at 64x64, for a machine that is busy: all trainings end within minutes
  emoji  the packaged model's UNet and autoencoder with a small CLIP text encoder, at 64x64
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from threading import Timer
from typing import Any

WRAPPER = """
import json, os, runpy, sys, time
import torch
from accelerate import Accelerator
log = Accelerator.log
def timed(self, values, step=None, **options):
    loss = values.get("train_loss", values.get("loss"))
    if loss is not None:
        with open(os.environ["STEPS_FILE"], "a") as file:
            file.write(json.dumps([time.perf_counter(), step, loss]) + chr(10))
        if step >= int(os.environ["STEPS_STOP"]):
            with open(os.environ["STEPS_FILE"] + ".memory", "w") as file:
                file.write(str(torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0))
            os._exit(0)
    return log(self, values, step, **options)
Accelerator.log = timed
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Discs and boxes in several colours, with captions that diffusers' script and ours both read."""
    import random

    from PIL import Image, ImageDraw

    folder.mkdir()
    draw = random.Random(0)
    colours = ["red", "green", "blue", "yellow", "purple", "orange", "black", "brown"]
    rows = []
    for i in range(count):
        colour, shape = draw.choice(colours), draw.choice(["disc", "box"])
        image = Image.new("RGB", (side, side), "white")
        corner, size = (draw.randrange(side // 2), draw.randrange(side // 2)), draw.randrange(side // 6, side // 2)
        box = (*corner, corner[0] + size, corner[1] + size)
        (ImageDraw.Draw(image).ellipse if shape == "disc" else ImageDraw.Draw(image).rectangle)(box, fill=colour)
        image.save(folder / f"{i:04d}.png")
        rows.append({"file_name": f"{i:04d}.png", "text": f"a {colour} {shape}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def make_model(folder: Path, name: str) -> int:
    """A pipeline folder in diffusers' layout; returns the side of its pictures."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from latentdiff import TextToImagePipeline

    torch.manual_seed(0)
    if name == "emoji":
        packaged = TextToImagePipeline.from_pretrained("emoji")
        unet, vae, side = packaged.unet, packaged.vae, 64
        text = CLIPTextConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=6)
    else:
        small = name == "tiny"
        width, side = (64, 64) if small else (768, 128)
        text = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64) if small else (128, 256, 512, 512),
            layers_per_block=1 if small else 2,
        )
        unet = diffusers.UNet2DConditionModel(
            sample_size=side // 8,
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(32, 64, 64) if small else (128, 256, 256),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=4,
        )
        with torch.no_grad():
            latents = vae.encode(torch.rand(4, 3, side, side) * 2 - 1).latent_dist.mean
        vae.register_to_config(scaling_factor=1 / float(latents.std()))
    text_encoder = CLIPTextModel(text)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    TextToImagePipeline(vae, text_encoder, clip_tokenizer(folder.parent), unet, scheduler).save_pretrained(folder)
    return side


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that spells words out by letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    merges.write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), model_max_length=77)


class OutOfTime(SystemExit):
    """A training took longer than it had."""


def measure(command: list[str], folder: Path, stop: int = 1 << 60, timeout: float | None = None) -> dict[str, float]:
    """Run a training; steps per second after the first fifth (of the median step: others run beside it, and ours may
    draw samples), peak memory in MiB, mean loss of the last half.

    Args:
        stop: the step after which it ends at once, with nothing saved; then the GPU's memory is among what is found.
        timeout: seconds after which it is given up.

    Raises:
        OutOfTime: it was given up.
        SystemExit: it failed.
    """
    steps_file = folder / "steps.jsonl"
    environment = {
        **os.environ,
        "STEPS_FILE": str(steps_file),
        "STEPS_STOP": str(stop),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    started = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", WRAPPER, *command], env=environment, stdout=log, stderr=log, cwd=folder
        )
        timer = None if timeout is None else Timer(timeout, process.kill)
        if timer is not None:
            timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            process.kill()  # of one that has ended nothing comes
            if timer is not None:
                timer.cancel()
    if timeout is not None and status == signal.SIGKILL:
        raise OutOfTime(f"{' '.join(command[:3])} took more than {timeout:.0f} s; see --minutes, --model and --steps")
    if status != 0:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    rows = [json.loads(line) for line in steps_file.read_text().splitlines()]
    kept = rows[len(rows) // 5 :]
    losses = [row[2] for row in rows[len(rows) // 2 :]]
    memory = folder / "steps.jsonl.memory"
    return {
        "gpu_memory_mib": float(memory.read_text()) if memory.exists() else 0.0,
        "steps_per_second": 1 / statistics.median(after[0] - before[0] for before, after in pairwise(kept)),
        "peak_memory_mib": usage.ru_maxrss / 1024,
        "seconds_in_all": time.perf_counter() - started,
        "loss": statistics.fmean(losses),
        "loss_error": statistics.stdev(losses) / len(losses) ** 0.5,
    }


def ours(model: Path, data: Path, out: Path, side: int, options: argparse.Namespace, cache: bool) -> list[str]:
    settings = {
        "resolution": side,
        "batch_size": options.batch,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "weight_decay": 0.01,
        "adam_beta2": 0.999,
        "ema_decay": 0.9999,
        "min_snr_gamma": "null",
        "caption_dropout": 0,
        "log_every": 1,
        "cache_latents": cache,
        "cache_text": cache,
        "cache_dir": out.parent.parent / "cache",
        "checkpoint_every": options.steps,
        "sample_every": options.steps * 10,
        "sample_steps": 1,
        "sample_prompts": "[a red disc]",
        "seed": 1,
        "mixed_precision": options.precision,
        "num_workers": options.workers,
    }
    start = ["-m", "latentdiff.training", "finetune", "--model", str(model), "--data", str(data), "--output", str(out)]
    return [*start, "--method", "full", *(f"{key}={value}" for key, value in settings.items())]


def theirs(model: Path, data: Path, out: Path, side: int, options: argparse.Namespace) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": data,
        "output_dir": out,
        "cache_dir": out.parent / "datasets",
        "image_column": "image",
        "caption_column": "text",
        "resolution": side,
        "train_batch_size": options.batch,
        "max_train_steps": options.steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpointing_steps": options.steps,
        "seed": 1,
        "report_to": "tensorboard",
        "mixed_precision": options.precision,
        "dataloader_num_workers": options.workers,
    }
    flags = ["--center_crop", "--random_flip", "--use_ema", "--foreach_ema"]
    return [
        str(options.script),
        *(part for key, value in settings.items() for part in (f"--{key}", str(value))),
        *flags,
    ]


def peer(model: Path, data: Path, side: int, options: argparse.Namespace) -> list[str]:
    settings = {
        "model": model,
        "data": data,
        "resolution": side,
        "batch": options.batch,
        "steps": options.steps,
        "learning-rate": options.learning_rate,
        "precision": options.precision,
        "encoded": model.parent / "encoded.pt",
    }
    script = str(Path(__file__).with_name("cached_peer.py"))
    return [script, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]


def table(options: argparse.Namespace, results: dict[str, list[dict[str, float]]], base: str) -> str:
    """Medians of what was measured so far; ratios to `base`."""
    done = {name: rows for name, rows in results.items() if rows}
    lines = [f"{options.model}, batch {options.batch}, {options.steps} steps; medians", ""]
    lines += ["| | steps/s | lowest and highest | ratio | peak memory | loss, last half | rounds |", "|" + "---|" * 7]
    rates = {name: [row["steps_per_second"] for row in rows] for name, rows in done.items()}
    for name, rows in done.items():
        rate = statistics.median(rates[name])
        ratio = f"{rate / statistics.median(rates[base]):.2f}" if base in rates else ""
        memory = statistics.median(row["peak_memory_mib"] for row in rows)
        spread, loss = f"{min(rates[name]):.2f} to {max(rates[name]):.2f}", rows[0]
        lines.append(
            f"| {name} | {rate:.2f} | {spread} | {ratio} | {memory:.0f} MiB | {loss['loss']:.4f} ± "
            f"{loss['loss_error']:.4f} | {len(rows)} |"
        )
    return "\n".join(lines)


def rounds(root: Path, options: argparse.Namespace, results: dict[str, list[dict[str, float]]], base: str) -> None:
    """Make rounds, and write down what is found after each training."""
    end = time.monotonic() + 60 * options.minutes
    side = make_model(root / "model", options.model)
    make_pictures(root / "pictures", options.pictures, side * 2)
    for i in range(options.repeats):
        for name, rows in results.items():
            place = root / f"{name} {i}"
            place.mkdir()
            shared = (root / "model", root / "pictures", place / "out", side, options)
            if name == "diffusers":
                command = theirs(*shared)
            elif name == "diffusers, cached":
                command = peer(root / "model", root / "pictures", side, options)
            else:
                command = ours(*shared, cache="no cache" not in name)
            # It ends after the last step, so that nothing that only ours does then is measured.
            rows.append(measure(command, place, stop=options.steps, timeout=max(1.0, end - time.monotonic())))
            print(name, {key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
            options.results.mkdir(parents=True, exist_ok=True)
            (options.results / "measured.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
            (options.results / "table.md").write_text(table(options, results, base) + "\n", encoding="utf-8")
            shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for measured.json and table.md")
    parser.add_argument("--script", type=Path, help="diffusers' train_text_to_image.py")
    parser.add_argument("--model", choices=["sd", "emoji", "tiny"], default="sd")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--repeats", type=int, default=5, help="rounds at the most")
    parser.add_argument("--minutes", type=float, default=28.0, help="for all rounds; the last may be cut short")
    options = parser.parse_args()
    names = ["ours, cached", "diffusers, cached"]
    if options.script:
        options.script = options.script.resolve()
        names = ["ours, cached", "diffusers", "diffusers, cached", "ours, no cache"]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        try:
            rounds(Path(temporary), options, results, names[1])
        except (OutOfTime, KeyboardInterrupt) as stop:
            print("time is over" if isinstance(stop, OutOfTime) else "interrupted", flush=True)
    print("\n" + table(options, results, names[1]))


if __name__ == "__main__":
    main()
