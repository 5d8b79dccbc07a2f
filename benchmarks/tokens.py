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


def models(layers: int, heads: int, side: int, codes: int) -> tuple[TokenTransformer, GPT2LMHeadModel]:
    """Ours and transformers', of one size, with random weights."""
    torch.manual_seed(0)
    ours = TokenTransformer(codes, side, num_layers=layers, num_attention_heads=heads, attention_head_dim=64)
    config = GPT2Config(
        vocab_size=codes + 1,
        n_positions=side**2 + 1,
        n_embd=64 * heads,
        n_layer=layers,
        n_head=heads,
        bos_token_id=codes,
        eos_token_id=None,
    )
    return ours.eval(), GPT2LMHeadModel(config).eval()


def ways(ours: TokenTransformer, theirs: GPT2LMHeadModel, batch: int) -> dict[str, Callable[[], object]]:
    """How each draws `batch` grids of codes."""
    codes, places = theirs.config.bos_token_id, theirs.config.n_positions - 1
    pipeline = UnconditionalTokenPipeline(ours, VQModel(block_out_channels=(32,), num_vq_embeddings=codes))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(theirs.device, theirs.dtype)
    start, likeliest = torch.full((batch, 1), codes, device=theirs.device), min(100, codes)
    limits = {"max_new_tokens": places, "min_new_tokens": places, "do_sample": True, "top_k": likeliest}
    limits |= {"pad_token_id": codes, "attention_mask": torch.ones_like(start)}
    return {
        "latentdiff": lambda: pipeline(batch, seed=0, top_k=likeliest, output_type="latent"),
        "transformers": lambda: theirs.generate(start, **limits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("layers", 8), ("heads", 6), ("side", 16), ("codes", 1024), ("batch", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    both, places = models(asked.layers, asked.heads, asked.side, asked.codes), asked.side**2
    draws = ways(*both, asked.batch)
    found: dict[str, list[float]] = {name: [] for name in draws}
    with torch.no_grad():
        for _ in range(asked.rounds + 1):  # the first is to warm up
            for name, draw in draws.items():
                found[name].append(seconds(draw))
    sizes = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in both]
    print(f"{platform.machine()}, torch {torch.__version__}, threads: {torch.get_num_threads()}, ", end="")
    print(f"transformers {transformers.__version__}; {places} codes, batch {asked.batch}")
    for size, (name, times) in zip(sizes, found.items(), strict=True):
        middle, least = statistics.median(times[1:]), min(times[1:])
        print(f"{name:<14} {size:5.1f} M weights {middle:7.3f} s, at best {least:7.3f} s", end="")
        print(f" {1000 * middle / places:7.2f} ms a code")


if __name__ == "__main__":
    main()
