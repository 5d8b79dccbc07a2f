"""A UNet and a transformer of one size, trained on the same pictures for the same processor time each, at once.

    python benchmarks/denoisers.py --data PICTURES --output runs/denoisers --minutes 20

Each has one core (OMP_NUM_THREADS=1) and the same latents, captions and settings; the caches are filled before. It is
told to stop when the process has used so much processor time, start and measuring included, so that other load hits
neither. Shown are the held-out losses by processor time. OUTPUT/unet and OUTPUT/dit are pipelines that draw.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

NETWORKS = {
    "unet": ("block_out_channels=[96,192]", "attention_levels=[true,true]", "layers_per_block=1"),  # 10.0 M parameters
    "dit": ("network=dit", 'network_options={"depth":6,"width":320}'),  # 10.9 M
}
COMMON = (
    *("resolution=128", "batch_size=64", "ema_decay=0.995", "mixed_precision=bf16"),
    *("random_flip=false", "sample_every=100", "checkpoint_every=100", "sample_guidance_scale=3.5"),
    'sample_prompts=["a red car","a green apple","a yellow sun","a blue fish"]',
)
TICKS = os.sysconf("SC_CLK_TCK")


def start(options: argparse.Namespace, name: str, output: Path, *more: str) -> subprocess.Popen[bytes]:
    """Begin a training; what it says is in OUTPUT.log."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "latentdiff", "train", "denoiser", "--data", options.data, "--output", str(output)]
    settings = [f"autoencoder={options.model}", f"text_encoder={options.model}", f"cache_dir={options.output}/cache"]
    settings += [f"learning_rate={options.learning_rate}", *COMMON, *NETWORKS[name], *more]
    with output.with_suffix(".log").open("ab") as log:
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.Popen([*command, *settings], stdout=log, stderr=log, env=surroundings)


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """That a running process has used."""
    numbers = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / TICKS


def measured(output: Path) -> list[dict[str, float]]:
    """The held-out losses up to now."""
    file = output / "training" / "metrics.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
    return [row for row in rows if "val_loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of captioned pictures, 128x128 or larger")
    parser.add_argument("--model", default="emoji", help="whose autoencoder and text encoder are taken")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0, help="of a processor, for each")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    options = parser.parse_args()
    for name in NETWORKS:
        if start(options, name, options.output / "filled" / name, "max_steps=1", "warmup_steps=0").wait():
            raise SystemExit(f"see {options.output}/filled/{name}.log")
    running = {
        name: start(options, name, options.output / name, "max_steps=1000000", "warmup_steps=100") for name in NETWORKS
    }
    shown = dict.fromkeys(NETWORKS, 0)
    while running:
        time.sleep(0.5)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                used = 60 * options.minutes
            else:
                used = processor_seconds(process)
                if used >= 60 * options.minutes:
                    process.terminate()
            for row in measured(options.output / name)[shown[name] :]:
                shown[name] += 1
                bands = " ".join(f"{row[key]:.3f}" for key in row if key.startswith("val_loss_"))
                pictures = int(row["step"]) * 64
                print(
                    f"{name:5} {used:6.0f} s {pictures:8} pictures  held-out {row['val_loss']:.4f}  ({bands})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
