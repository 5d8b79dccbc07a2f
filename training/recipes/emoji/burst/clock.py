"""What the trainings share: a learning rate that follows the clock, averaged weights, a log, files of weights."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.interchange.atomic import atomic_file

SHARD = 15_000_000  # bytes; files of at most 16 MiB come back


class Clock:
    """Seconds of a training, and the learning rate at each moment: a short rise, a plateau, a linear fall to zero.

    Args:
        seconds: how long the training lasts from now.
        rate: of the plateau.
        warmup: updates until the plateau.
        fall: share of the time that the fall takes.
    """

    def __init__(self, seconds: float, rate: float, warmup: int = 200, fall: float = 0.4) -> None:
        self.begun, self.seconds = time.monotonic(), seconds
        self.peak, self.warmup, self.fall = rate, warmup, fall
        self.updates = 0

    @property
    def share(self) -> float:
        """How much of the time is over, 0 to 1."""
        return min((time.monotonic() - self.begun) / self.seconds, 1.0)

    @property
    def over(self) -> bool:
        return self.share >= 1

    def rate(self) -> float:
        rise = min((self.updates + 1) / self.warmup, 1.0)
        return self.peak * rise * min((1 - self.share) / self.fall, 1.0)

    def begin_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer the rate of this moment, and count the update."""
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rate())
            else:
                group["lr"] = self.rate()
        self.updates += 1


@contextmanager
def averaged(network: nn.Module, average: EMAModel) -> Iterator[None]:
    """Within, the network has its averaged weights."""
    average.store(network.parameters())
    average.copy_to(network.parameters())
    try:
        yield
    finally:
        average.restore(network.parameters())


class Log:
    """One JSON object a line, in a file and on the terminal."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.begun = path, name, time.monotonic()

    def __call__(self, **figures: float | str) -> None:
        row = {"stage": self.name, "seconds": round(time.monotonic() - self.begun, 1), **figures}
        text = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def optimizer(network: nn.Module, rate: float, weight_decay: float = 0.0, beta2: float = 0.99) -> torch.optim.Optimizer:
    """AdamW; only matrices and kernels decay. On a GPU an update can be a part of a CUDA graph."""
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    device = next(network.parameters()).device
    fused = device.type == "cuda"
    first_rate = torch.tensor(rate, device=device) if fused else rate  # a graph reads it anew in every update
    return torch.optim.AdamW(groups, lr=first_rate, betas=(0.9, beta2), fused=fused, capturable=fused)


def apply_update(
    loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock, clip: float = 1.0
) -> None:
    """One update at the clock's rate."""
    clock.begin_update(optimizer)
    descend(loss, network, optimizer, clip)


def descend(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 1.0) -> None:
    """One update. A gradient that is not finite counts as none, without waiting for the device."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), clip)
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()


def repeated(work: Callable[[], None], device: torch.device, first: int = 3) -> Callable[[], None]:
    """What does `work` again and again: on a GPU as one CUDA graph, whose kernels need no launch of their own.

    An update of a small network is some two thousand kernels, and the processor needs longer to launch them than the
    GPU to run them. `work` reads and writes tensors that stay where they are, and takes no random numbers. It is done
    `first` times before it is recorded.
    """
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(first):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except Exception as error:  # a run that cannot be repeated goes on without
        print(f"no CUDA graph: {type(error).__name__}: {str(error)[:500]}", flush=True)
        return work
    return graph.replay


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def save_half(state: dict[str, Tensor], folder: Path, name: str) -> list[Path]:
    """Write tensors in half precision as `name-0.safetensors`, ... of at most `SHARD` bytes each; whole files only."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in state.items():
        half = tensor.detach().to("cpu", torch.float16).contiguous()
        if shards[-1] and size + half.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][key] = half
        size += half.nbytes
    paths = [folder / f"{name}-{i}.safetensors" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        with atomic_file(path) as partial:
            save_file(shard, partial)
    return paths


def load_half(folders: Iterable[Path], name: str) -> dict[str, Tensor]:
    """What `save_half` wrote, float32, from the first of `folders` that has it.

    Raises:
        FileNotFoundError: none has.
    """
    from safetensors.torch import load_file

    folders = list(folders)
    for folder in folders:
        paths = sorted(folder.glob(f"{name}-*.safetensors"))
        if paths:
            return {key: tensor.float() for path in paths for key, tensor in load_file(path).items()}
    raise FileNotFoundError(f"no {name}-*.safetensors in {', '.join(map(str, folders))}")
