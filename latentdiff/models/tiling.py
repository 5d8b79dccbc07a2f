"""A network run over large pictures tile by tile, in the memory of a few tiles."""

from collections.abc import Callable

import torch
from torch import Tensor


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, out_tile: int, overlap: float) -> Tensor:
    """`run` over overlapping square parts of `x`, blended linearly where they overlap; as diffusers' ``AutoencoderKL``.

    Every tile is run by itself, so what the network knows of the whole picture (normalisation, attention) it knows of
    the tile only, and tiles can differ in colour; the overlap hides the seams.

    Args:
        run: (B, C, h, w) to (B, C', h', w'), larger or smaller by ``out_tile / tile``.
        x: (B, C, H, W).
        tile, out_tile: sides of a tile before and after.
        overlap: from 0 to below 1, the share of a tile's side that the next one covers too.
    """
    step, blend = int(tile * (1 - overlap)), int(out_tile * overlap)
    kept, rows = out_tile - blend, []
    above: list[Tensor] = []
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], step):
            part = run(x[:, :, top : top + tile, left : left + tile])
            if above:
                part = blended(above[len(row)], part, blend, dim=2)
            if row:
                part = blended(row[-1], part, blend, dim=3)
            row.append(part)
        rows.append(torch.cat([part[:, :, :kept, :kept] for part in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def blended(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """`after`, whose first `extent` rows or columns come in gradually from the last ones of `before`."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    shape = [1] * after.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=after.device) / max(extent, 1)).to(after.dtype).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    mixed = end * (1 - ramp) + after.narrow(dim, 0, extent) * ramp
    return torch.cat([mixed, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)
