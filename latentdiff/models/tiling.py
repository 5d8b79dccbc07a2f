"""Running a network over large pictures tile by tile, with memory for one tile and the result."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Run = Callable[[Tensor], Tensor]


def in_tiles(run: Run, x: Tensor, tile: int, out_tile: int, overlap: float, *, shared_norms: bool = False) -> Tensor:
    """`run` over overlapping square parts of `x`, blended linearly where they overlap; as diffusers' ``AutoencoderKL``.

    Every tile is run by itself: normalisation and attention see one tile only, so that tiles can differ in colour; the
    overlap hides the seams. Of tiles already run, only the strips that the next ones need are kept.

    Args:
        run: (B, C, h, w) to (B, C', h', w'), larger or smaller by ``out_tile / tile``.
        x: (B, C, H, W).
        tile, out_tile: sides of a tile before and after; one is a multiple of the other.
        overlap: from 0 to below 1, the share of a tile's side that the next one covers too. It is rounded up to whole
            positions of the coarser grid. diffusers does not round, and returns another size where it matters.
        shared_norms: run all tiles twice, and the second time normalise them alike (`with_shared_norms`).
    """
    places = min(tile, out_tile)
    shared = min(math.ceil(places * overlap - 1e-6), places - 1)
    step, blend = (places - shared) * (tile // places), shared * (out_tile // places)
    kept, least = out_tile - blend, tile // places  # remainders below one output position are dropped
    height, width = (side * out_tile // tile for side in x.shape[2:])
    tops, lefts = (range(0, max(side - least, 0) + 1, step) for side in x.shape[2:])
    if shared_norms:
        parts = (x[:, :, top : top + tile, left : left + tile] for top in tops for left in lefts)
        run = with_shared_norms(run, parts)
    out: Tensor | None = None
    above: list[Tensor] = []  # the lowest rows of the tiles above
    for i, top in enumerate(tops):
        row: list[Tensor] = []
        before: Tensor | None = None  # the last columns of the tile to the left
        for j, left in enumerate(lefts):
            part = run(x[:, :, top : top + tile, left : left + tile])
            if above:
                part = blended(above[j], part, blend, dim=2)
            if before is not None:
                part = blended(before, part, blend, dim=3)
            if out is None:
                out = part.new_empty(*part.shape[:2], height, width)
            out[:, :, i * kept : (i + 1) * kept, j * kept : (j + 1) * kept] = part[:, :, :kept, :kept]
            before = part[:, :, :, max(part.shape[3] - blend, 0) :].clone()
            row.append(part[:, :, max(part.shape[2] - blend, 0) :].clone())
        above = row
    assert out is not None
    return out


def blended(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after`, whose first `extent` rows or columns come in gradually from the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * after.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=after.device) / max(extent, 1)).to(after.dtype).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    mixed = end * (1 - ramp) + after.narrow(dim, 0, extent) * ramp
    return torch.cat([mixed, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)


def with_shared_norms(run: Run, parts: Iterable[Tensor]) -> Run:
    """`run` with group normalisation by one mean and variance for all `parts`: the averages over a run of each.

    Raises:
        RuntimeError: gradients are enabled; recomputed activations would have other statistics.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("tile_shared_norms is for use without gradients: call the model within torch.no_grad()")
    norms = SharedNorms()
    for part in parts:
        norms.over(run, part)
    norms.average()
    return lambda part: norms.over(run, part)


class SharedNorms(TorchFunctionMode):
    """Group normalisation of the tiles of one picture, by statistics of their own until `average` is called, then by
    their average.

    The calls of ``group_norm`` in a run are identified by their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call, self.averaged = 0, False
        self.seen: list[list[tuple[Tensor, Tensor, int]]] = []  # for every call and tile: mean, variance, positions
        self.statistics: list[tuple[Tensor, Tensor]] = []  # for every call: mean and variance, (B, groups)

    def over(self, run: Run, part: Tensor) -> Tensor:
        self.call = 0
        with self:
            return run(part)

    def average(self) -> None:
        for tiles in self.seen:
            means = torch.stack([mean for mean, _, _ in tiles])  # (tiles, B, groups)
            variances = torch.stack([variance for _, variance, _ in tiles])
            weights = torch.tensor([float(tile[2]) for tile in tiles], device=means.device)[:, None, None]
            weights = weights / weights.sum()
            mean = (weights * means).sum(dim=0)
            self.statistics.append((mean, (weights * (variances + (means - mean).square())).sum(dim=0)))
        self.averaged = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.group_norm:
            return func(*args, **(kwargs or {}))
        self.call += 1
        return (self.normalise if self.averaged else self.observe)(*args, **(kwargs or {}))

    def observe(self, x: Tensor, num_groups: int, *args: Any, **kwargs: Any) -> Tensor:
        if self.call > len(self.seen):
            self.seen.append([])
        variance, mean = torch.var_mean(x.float().unflatten(1, (num_groups, -1)), dim=(2, 3, 4), correction=0)
        self.seen[self.call - 1].append((mean, variance, x.shape[2:].numel()))
        return F.group_norm(x, num_groups, *args, **kwargs)

    def normalise(self, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mean, variance = (s.repeat_interleave(x.shape[1] // num_groups, 1) for s in self.statistics[self.call - 1])
        scale = weight * (variance + eps).rsqrt()  # (B, C)
        return torch.addcmul((bias - mean * scale)[:, :, None, None], x, scale[:, :, None, None]).to(x.dtype)


def one_by_one(run: Run, x: Tensor) -> Tensor:
    """`run` over each image of a batch (B, C, H, W), with memory for one image and the result."""
    first = run(x[:1])
    out = first.new_empty(len(x), *first.shape[1:])
    out[:1] = first
    for i in range(1, len(x)):
        out[i : i + 1] = run(x[i : i + 1])
    return out
