"""Drawings as a judge may meet them: moved, turned in hue, on backgrounds, bent, blurred and noisy; in torch, batched.

What a model draws is neither as sharp nor as straight as an icon, and lies anywhere in a scene. A judge that has seen
only clean icons would call that unknown.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

BLOCK = 8  # of the cosine transform, as in JPEG


@dataclass(frozen=True)
class Distortion:
    """How strong each distortion is, at most, and how often those happen that need not."""

    scale: tuple[float, float] = (0.5, 1.08)
    tilt: float = 12.0  # degrees
    shear: float = 0.12
    bend: float = 0.035  # of the picture's side
    hue: float = 0.4  # how often
    ground: float = 0.5  # how often the background is not white
    neighbour: float = 0.3  # how often a piece of another drawing lies at the edge
    coarse: float = 0.5  # how often fine detail is lost
    coarsest: float = 0.3  # of the side
    noise: float = 0.5  # how often
    clean: float = 0.15  # how often the drawing is shown as it is


class Distorter:
    """(B, 4, S, S) drawings in [0, 1], straight alpha, to (B, 3, size, size) pictures in [0, 1].

    Args:
        size: side of the pictures.
        seed: of all that is random. The random numbers are drawn on the CPU, so that a run repeats on any device.
        strength: see `Distortion`.
    """

    def __init__(self, size: int, seed: int = 0, strength: Distortion | None = None) -> None:
        self.size, self.strength = size, strength or Distortion()
        self.generator = Generator().manual_seed(seed)

    def __call__(self, drawings: Tensor, turnable: Tensor) -> Tensor:
        """`turnable` (B,): whether the hue may be turned, which it may not be where a colour is part of the name."""
        count, device = len(drawings), drawings.device
        clean = self.chance(count, self.strength.clean).to(device)[:, None, None, None]
        rgb, alpha = drawings[:, :3], drawings[:, 3:]
        turned = self.turn_hues(rgb, turnable)
        moved = F.grid_sample(
            torch.cat([turned * alpha, alpha], 1),
            self.places(count).to(device),
            mode="bilinear",
            align_corners=False,
        )
        picture = self.grounds(count).to(device)  # (B, 3, 1, 1)
        picture = over(self.neighbours(moved), picture.expand(-1, -1, self.size, self.size))
        picture = over(moved, picture)
        picture = self.roughen(picture)
        still = F.interpolate(over(torch.cat([rgb * alpha, alpha], 1), torch.ones_like(rgb)), self.size, mode="area")
        return torch.where(clean, still, picture.clamp(0, 1))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def chance(self, count: int, share: float) -> Tensor:
        return torch.rand(count, generator=self.generator) < share

    def places(self, count: int) -> Tensor:
        """(B, size, size, 2): where each pixel of the picture comes from, for `grid_sample`."""
        s = self.strength
        scale = self.uniform(count, low=s.scale[0], high=s.scale[1])
        scale = torch.where(self.chance(count, 0.5), self.uniform(count, low=0.88, high=1.06), scale)
        angle = self.uniform(count, low=-1, high=1) * math.radians(s.tilt)
        shear = self.uniform(count, low=-1, high=1) * s.shear
        flip = torch.where(self.chance(count, 0.25), -1.0, 1.0)
        room = (1.06 - scale).clamp(min=0.04)
        x, y = (room * self.uniform(count, low=-1, high=1) for _ in range(2))
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rows = [flip * cos, flip * (shear * cos - sin), -flip * (cos * x - sin * y), sin, cos, -(sin * x + cos * y)]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [count, 1, self.size, self.size], align_corners=False)
        coarse = torch.randn(count, 2, 5, 5, generator=self.generator) * s.bend * self.uniform(count, 1, 1, 1)
        bend = F.interpolate(coarse, self.size, mode="bicubic", align_corners=False)
        return grid + 2 * bend.permute(0, 2, 3, 1)

    def turn_hues(self, rgb: Tensor, turnable: Tensor) -> Tensor:
        """Colours turned about the grey axis, and a little more or less vivid and light."""
        count, device = len(rgb), rgb.device
        turned = self.chance(count, self.strength.hue).to(device) & turnable
        angle = torch.where(turned, self.uniform(count, low=0, high=2 * math.pi).to(device), 0.0)
        matrix = turning(angle + self.uniform(count, low=-0.12, high=0.12).to(device))
        vivid = self.uniform(count, 1, 1, low=0.75, high=1.25).to(device)
        light = self.uniform(count, 1, 1, low=0.85, high=1.1).to(device)
        grey = torch.full((3, 3), 1 / 3, device=device)
        matrix = light * (vivid * matrix + (1 - vivid) * grey)
        return torch.einsum("bij,bjhw->bihw", matrix, rgb).clamp(0, 1)

    def grounds(self, count: int) -> Tensor:
        """(B, 3, 1, 1): white, or any colour."""
        colour = self.uniform(count, 3, 1, 1)
        pale = self.uniform(count, 1, 1, 1)
        white = 1 - 0.03 * self.uniform(count, 1, 1, 1)
        coloured = self.chance(count, self.strength.ground)[:, None, None, None]
        return torch.where(coloured, 1 - pale * (1 - colour), white.expand(-1, 3, -1, -1))

    def neighbours(self, moved: Tensor) -> Tensor:
        """Another drawing of the batch, pushed so far to a side that only a piece of it is seen; (B, 4, H, W)."""
        count, device = len(moved), moved.device
        seen = self.chance(count, self.strength.neighbour).to(device)[:, None, None, None]
        side = torch.randint(4, (count,), generator=self.generator)
        push = self.uniform(count, low=1.3, high=1.9)
        across = torch.where(side < 2, torch.where(side == 0, push, -push), self.uniform(count, low=-0.5, high=0.5))
        down = torch.where(side >= 2, torch.where(side == 2, push, -push), self.uniform(count, low=-0.5, high=0.5))
        zero, one = torch.zeros(count), torch.ones(count)
        rows = torch.stack([one, zero, across, zero, one, down], 1).view(-1, 2, 3)
        grid = F.affine_grid(rows, [count, 1, self.size, self.size], align_corners=False).to(device)
        return F.grid_sample(moved.roll(1, 0), grid, align_corners=False) * seen

    def roughen(self, picture: Tensor) -> Tensor:
        """Detail lost by a smaller picture, and the noise of a coarse cosine transform."""
        s = self.strength
        sides = torch.where(
            self.chance(4, s.coarse), self.uniform(4, low=s.coarsest, high=0.8), torch.ones(4)
        )  # one for each quarter of the batch: pictures of one batch must have one size
        parts = [self.coarsen(part, float(side)) for part, side in zip(picture.chunk(4), sides, strict=False)]
        picture = torch.cat(parts)
        step = self.uniform(len(picture), 1, 1, 1, low=0.02, high=0.22).to(picture.device)
        grain = 0.03 * torch.randn(len(picture), 3, self.size // 2, self.size // 2, generator=self.generator)
        rough = quantise(picture, step) + F.interpolate(grain, self.size, mode="bilinear").to(picture.device)
        return torch.where(self.chance(len(picture), s.noise).to(picture.device)[:, None, None, None], rough, picture)

    def coarsen(self, picture: Tensor, share: float) -> Tensor:
        if share >= 1:
            return picture
        small = F.interpolate(picture, round(self.size * share), mode="bilinear", antialias=True)
        return F.interpolate(small, self.size, mode="bicubic", align_corners=False)


def over(top: Tensor, bottom: Tensor) -> Tensor:
    """(B, 4, H, W), colour already times alpha, laid over (B, 3, H, W)."""
    return top[:, :3] + (1 - top[:, 3:]) * bottom


def turning(angle: Tensor) -> Tensor:
    """(B,) radians to (B, 3, 3): the rotation of RGB about its grey axis (Rodrigues)."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / 3**0.5
    grey = torch.full((3, 3), 1 / 3, device=angle.device)
    return cos * torch.eye(3, device=angle.device) + sin * cross + (1 - cos) * grey


def quantise(picture: Tensor, step: Tensor) -> Tensor:
    """(B, 3, H, W) with the coefficients of its 8x8 cosine transform rounded, more coarsely the finer they are.

    H and W must be multiples of 8; `step` (B, 1, 1, 1) is the rounding of the finest, in the picture's units.
    """
    n = torch.arange(BLOCK, dtype=picture.dtype, device=picture.device)
    basis = torch.cos(math.pi / BLOCK * (n + 0.5) * n[:, None]) * (2 / BLOCK) ** 0.5  # (frequency, place)
    basis[0] /= 2**0.5
    count, channels, height, width = picture.shape
    blocks = picture.view(count, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(3, 4)
    steps = step[..., None, None] * (0.15 + (n + n[:, None]) / (BLOCK - 1))  # (B, 1, 1, 1, 8, 8)
    found = ((basis @ blocks @ basis.T) / steps).round() * steps
    return (basis.T @ found @ basis).transpose(3, 4).reshape(picture.shape)
