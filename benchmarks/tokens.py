"""Drawing codes with the cache beside transformers' ``generate`` on a GPT-2 of the same size, in one run.

python benchmarks/tokens.py [--layers 8] [--heads 6] [--side 16] [--codes 1024] [--batch 1] [--rounds 5]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from latentdiff.models import TokenTransformer, VQModel
from latentdiff.pipelines import UnconditionalTokenPipeline


def seconds(draw: Callable[[], object]) -> float:
    began = time.perf_counter()
    draw()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("layers", 8), ("heads", 6), ("side", 16), ("codes", 1024), ("batch", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    width, places = 64 * asked.heads, asked.side**2
    torch.manual_seed(0)
    ours = TokenTransformer(
        asked.codes, asked.side, num_layers=asked.layers, num_attention_heads=asked.heads, attention_head_dim=64
    ).eval()
    autoencoder = VQModel(block_out_channels=(32,), num_vq_embeddings=asked.codes)
    pipeline = UnconditionalTokenPipeline(ours, autoencoder)
    pipeline.set_progress_bar_config(disable=True)
    config = GPT2Config(
        vocab_size=asked.codes + 1,
        n_positions=places + 1,
        n_embd=width,
        n_layer=asked.layers,
        n_head=asked.heads,
        bos_token_id=asked.codes,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config).eval()
    start = torch.full((asked.batch, 1), asked.codes)
    limits = {"max_new_tokens": places, "min_new_tokens": places, "do_sample": True, "top_k": 100}
    limits |= {"pad_token_id": asked.codes, "attention_mask": torch.ones_like(start)}
    ways: dict[str, Callable[[], object]] = {
        "latentdiff": lambda: pipeline(asked.batch, seed=0, top_k=100, output_type="latent"),
        "transformers": lambda: theirs.generate(start, **limits),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(asked.rounds + 1):  # the first is to warm up
            for name, draw in ways.items():
                found[name].append(seconds(draw))
    sizes = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in (ours, theirs)]
    print(f"{platform.machine()}, torch {torch.__version__}, threads: {torch.get_num_threads()}, ", end="")
    print(f"transformers {transformers.__version__}; {places} codes, batch {asked.batch}")
    for size, (name, times) in zip(sizes, found.items(), strict=True):
        middle, least = statistics.median(times[1:]), min(times[1:])
        print(f"{name:<14} {size:5.1f} M weights {middle:7.3f} s, at best {least:7.3f} s", end="")
        print(f" {1000 * middle / places:7.2f} ms a code")


if __name__ == "__main__":
    main()
