"""A judge of what a picture is of: a ResNet that has seen clean pictures only, and no other network's answers.

It shares nothing with the classifier that guides: another architecture, trained on pictures without noise.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.training.data import CaptionedPicture, load_pictures, read_pixels

SIDE = 64  # what pictures are enlarged to: the ResNet halves four times before it is done looking
BATCH = 32
STEPS = 900


class Judge(nn.Module):
    """Pictures (B, 3, h, w) in [-1, 1] -> logits of the classes (B, K)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=False))

    @torch.no_grad()
    def answers(self, pixels: Tensor) -> Tensor:
        """The class of each picture, (N,) long."""
        return torch.cat([self(part).argmax(1) for part in pixels.split(64)])


def tensors(pictures: Sequence[CaptionedPicture], classes: Sequence[str], side: int) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, side, side), and the numbers of their classes (N,)."""
    pixels = torch.stack([read_pixels(picture, side, side) for picture in pictures])
    return pixels, torch.tensor([classes.index(picture.captions[0]) for picture in pictures])


def train(pictures: Sequence[CaptionedPicture], classes: Sequence[str], side: int, seed: int = 1234) -> Judge:
    """A judge, after `STEPS` steps."""
    torch.manual_seed(seed)
    pixels, labels = tensors(pictures, classes, side)
    weights = torch.tensor([picture.weight for picture in pictures])
    judge = Judge(len(classes))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.2)
    for step in range(1, STEPS + 1):
        chosen = torch.multinomial(weights, BATCH, replacement=True)
        x, y = moved(pixels[chosen]), labels[chosen]
        loss = F.cross_entropy(judge(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"judge, step {step}: loss {loss.item():.3f}", flush=True)
    return judge.eval()


def moved(pixels: Tensor) -> Tensor:
    """Each picture mirrored or not, and a little out of place and in another size; what is uncovered is white."""
    count = len(pixels)
    scale = 1 / torch.empty(count).uniform_(0.8, 1.1)
    place = torch.zeros(count, 2, 3)
    place[:, 0, 0] = scale * torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    place[:, 1, 1] = scale
    place[:, :, 2] = torch.empty(count, 2).uniform_(-0.15, 0.15)
    grid = F.affine_grid(place, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def load_or_train(file: Path, data: str, classes: Sequence[str], column: str, side: int) -> Judge:
    """The judge in `file`; without one, a new one is trained and kept there."""
    judge = Judge(len(classes))
    if file.is_file():
        judge.load_state_dict(load_file(file))
        return judge.eval()
    pictures = load_pictures(data, caption_column=column, condition="class")
    judge = train(pictures, classes, side)
    save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, file)
    return judge
