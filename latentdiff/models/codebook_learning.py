"""Codebook learning without gradients: moving averages, initialisation from data, restarts of dead codes.

Like an optimizer, a `CodebookLearner` is separate from the model, which saves only its codes.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.models.bottlenecks import VectorQuantizer

POOL = 65_536  # vectors that a process keeps of an update, for initialisation and restarts
KMEANS_ROUNDS = 10
USAGE_MEMORY = 0.99  # decay of the usage counts of codes that learn by gradient


class CodebookLearner(nn.Module):
    """Moves the codes of a `VectorQuantizer` to the encoder's vectors.

    Call ``observe`` after every forward pass, ``update`` after every optimizer step, and ``forget`` after a skipped
    step. Processes share their vectors and hold the same codes. Random numbers come from torch's CPU generator.

    - ``decay``: codes are moving averages of the vectors that chose them (VQ-VAE, van den Oord et al. 2017, App. A.1,
      without its smoothing: a code that no vector chose stays where it is), and gradients do not move them. None:
      gradients do.
    - ``start``: at the first update, codes are random vectors of it ("data"), or the centres of their clusters
      ("kmeans"), or stay as they are ("none").
    - ``restart_after``: the number of updates without use after which a code is moved to a random vector of the last
      update (Jukebox, Dhariwal et al. 2020, Sec. 3.1, restarts by average use instead). 0: never.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        decay: float | None = 0.99,
        start: Literal["kmeans", "data", "none"] = "kmeans",
        restart_after: int = 100,
    ) -> None:
        super().__init__()
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), not {decay}")
        if start not in ("kmeans", "data", "none"):
            raise ValueError(f"start must be 'kmeans', 'data' or 'none', not {start!r}")
        if restart_after < 0:
            raise ValueError(f"restart_after must be 0 or more, not {restart_after}")
        self._quantizer = [quantizer]  # in a list: it is not this module's to save or to move
        self.decay, self.start, self.restart_after = decay, start, restart_after
        codes, dim = quantizer.embedding.weight.shape
        if decay is not None:
            quantizer.embedding.weight.requires_grad_(False)
            quantizer.embedding.weight.learns_without_gradient = True  # type: ignore[attr-defined]
        self.register_buffer("counts", torch.zeros(codes))  # how often a code was chosen, averaged
        self.register_buffer("sums", torch.zeros(codes, dim))  # the vectors that chose it, summed and so averaged
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.int64))  # updates since it was last chosen
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.new_counts: Tensor | None = None
        self.new_sums: Tensor | None = None
        self.pool: list[Tensor] = []

    counts: Tensor
    sums: Tensor
    idle: Tensor
    updates: Tensor

    @property
    def codes(self) -> Tensor:
        """(K, D)"""
        return self._quantizer[0].embedding.weight

    @torch.compiler.disable
    @torch.no_grad()
    def observe(self, vectors: Tensor, indices: Tensor) -> None:
        """Record one forward pass; vectors that are not finite are left out.

        Args:
            vectors: (B, D, h, w), the input of the quantizer.
            indices: (B, h, w), the codes it chose.
        """
        flat = vectors.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
        if self._quantizer[0].distance == "cosine":
            flat = F.normalize(flat, dim=1)
        sound = flat.isfinite().all(1)
        flat, chosen = flat[sound], indices.flatten()[sound]
        if self.new_counts is None or self.new_sums is None:
            self.new_counts, self.new_sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        self.new_counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=self.new_counts.dtype))
        self.new_sums.index_add_(0, chosen, flat)
        room = POOL - sum(len(part) for part in self.pool)
        if room > 0:
            self.pool.append(flat[:room])

    def forget(self) -> None:
        """Drop what was observed since the last update."""
        self.new_counts = self.new_sums = None
        self.pool = []

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes by what was observed since the last update."""
        if self.new_counts is None or self.new_sums is None:
            return
        new_counts, new_sums = all_sum(self.new_counts), all_sum(self.new_sums)
        vectors = torch.cat(self.pool)
        if self.updates == 0 and self.start != "none":
            self._begin(vectors)
        else:
            self._average(new_counts, new_sums)
            self.idle = torch.where(new_counts > 0, 0, self.idle + 1)
            dead = self.idle >= (self.restart_after or math.inf)
            if dead.any() and len(vectors):
                self._place(dead, vectors[draw(len(vectors), int(dead.sum())).to(vectors.device)])
        if self._quantizer[0].distance == "cosine":
            self.codes.copy_(F.normalize(self.codes, dim=1))
        self.updates += 1
        self.forget()

    def _average(self, new_counts: Tensor, new_sums: Tensor) -> None:
        decay = USAGE_MEMORY if self.decay is None else self.decay
        self.counts.lerp_(new_counts, 1 - decay)
        self.sums.lerp_(new_sums, 1 - decay)
        if self.decay is None:
            return
        chosen = new_counts > 0
        self.codes[chosen] = (self.sums[chosen] / self.counts[chosen, None]).to(self.codes.dtype)

    def _begin(self, vectors: Tensor) -> None:
        """Codes from the vectors of the first update."""
        spread = vectors.std(0).mean() if len(vectors) > 1 else vectors.new_ones(())
        codes = vectors[draw(len(vectors), len(self.codes)).to(vectors.device)]
        # With fewer vectors than codes, some are drawn twice; the noise makes their codes differ.
        codes = codes + 1e-3 * spread * torch.randn(codes.shape).to(codes)
        if self.start == "kmeans":
            codes = kmeans(vectors, codes)
        self._place(torch.ones(len(codes), dtype=torch.bool, device=codes.device), codes)

    def _place(self, which: Tensor, codes: Tensor) -> None:
        """Set the codes selected by `which` (K,) to `codes`, with the count of an average code, in all processes.

        With that count a new code follows its vectors about as fast as the others do.
        """
        if torch.distributed.is_initialized():
            codes = codes.contiguous()
            torch.distributed.broadcast(codes, 0)
        weight = (self.counts.mean() if self.updates > 0 else torch.ones(())).to(codes).clamp(min=1e-3)
        self.codes[which] = codes.to(self.codes.dtype)
        self.counts[which], self.sums[which] = weight, codes * weight
        self.idle[which] = 0

    def statistics(self, recent: int = 100) -> dict[str, float]:
        """``codes_in_use``: the share of the codes that were used in the last `recent` updates.
        ``codebook_perplexity``: the exponential of the entropy of the averaged counts; K if all are used alike.
        """
        shares = self.counts / self.counts.sum().clamp(min=1e-12)
        entropy = -torch.xlogy(shares, shares).sum()
        in_use = (self.idle < recent).float().mean()
        return {"codes_in_use": float(in_use), "codebook_perplexity": float(entropy.exp())}


def draw(size: int, number: int) -> Tensor:
    """`number` random indices below `size`, each at most once if there are enough."""
    if number <= size:
        return torch.randperm(size)[:number]
    return torch.randint(size, (number,))


def kmeans(vectors: Tensor, centres: Tensor, rounds: int = KMEANS_ROUNDS) -> Tensor:
    """Lloyd's algorithm: `centres` (K, D) are moved to the means of the `vectors` (N, D) nearest to them, repeatedly.

    A centre without vectors is moved to a vector that is farthest from its centre, so that all K stay in use.
    """
    for _ in range(rounds):
        nearest = [torch.cdist(part, centres).min(1) for part in vectors.split(4096)]
        distance, index = torch.cat([n.values for n in nearest]), torch.cat([n.indices for n in nearest])
        counts = torch.zeros(len(centres), device=vectors.device).index_add_(0, index, torch.ones_like(distance))
        means = torch.zeros_like(centres).index_add_(0, index, vectors) / counts.clamp(min=1)[:, None]
        empty = counts == 0
        means[empty] = centres[empty]
        number = min(int(empty.sum()), len(vectors))
        if number:
            means[empty.nonzero().flatten()[:number]] = vectors[distance.topk(number).indices]
        centres = means
    return centres


def all_sum(x: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x
