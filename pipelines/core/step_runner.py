"""The denoiser's step on a GPU as one CUDA graph, its network compiled before: what `optimize` may choose there.

At Stable Diffusion's size a step is some thousand short kernels, and one or two pictures at once take as long as the
processor needs to start them. A graph starts all of them at once.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

MOST_GRAPHS = 8  # each has its inputs and result; what is in between they share
WARM_UPS = 2
USUAL = {*vars(nn.Module())} - {"training"}  # attributes of every module
PLAIN = (bool, int, float, str, type(None))

Run = Callable[[], Tensor]
Record = Callable[[Run, Any], tuple[Callable[[], Any], Tensor]]


class Recorded(NamedTuple):
    """A step that was recorded: what it reads, what runs it, and where its result then is."""

    inputs: list[Tensor]
    replay: Callable[[], Any]
    result: Tensor


class StepRunner:
    """Runs the steps of a denoiser that works in parts (`network.Denoiser`), each shape recorded when it first comes.

    Where gradients are asked for, under autocast, which casts weights into memory that is soon another's, where weights
    are loaded as they are needed, and on a processor steps run as they are. Threads may share one; a copy records anew.

    Args:
        compiled: by ``torch.compile``, for each shape anew.
        graphs: as CUDA graphs.
        record: makes a graph of a function without arguments; returns what runs it, and its result.
    """

    def __init__(self, *, compiled: bool, graphs: bool, record: Record | None = None) -> None:
        self.compiled, self.graphs, self._record = compiled, graphs, record or on_gpu
        self._compiled_of: dict[type, Any] = {}
        self._recorded: OrderedDict[Any, Recorded] = OrderedDict()
        self._pool: Any = None
        self._lock = threading.Lock()

    def __call__(self, network: Any, state: str, latents: Tensor, time: Tensor, prepared: Any) -> Tensor:
        """``network.denoise(latents, time, prepared)``.

        state: `network_state` of the network.
        """
        place = latents.device.type
        if place != "cuda" and self._record is on_gpu:
            with self._lock:
                self._recorded.clear()  # the pipeline has left the GPU, and so does what they take
                self._pool = None
            return network.denoise(latents, time, prepared)
        offloaded = next(network.parameters()).device != latents.device
        if offloaded or torch.is_grad_enabled() or torch.is_autocast_enabled(place):
            return network.denoise(latents, time, prepared)
        if not self.graphs:
            return self._compute(network, latents, time, prepared)
        parts, structure = tree_flatten((latents, time, prepared))
        given = [part for part in parts if isinstance(part, Tensor)]
        kinds = [(part.shape, part.stride(), part.dtype, part.device) for part in given]
        others = tuple(setting(part) for part in parts if not isinstance(part, Tensor))
        key = (state, structure, others, *kinds)
        with self._lock:
            with torch.inference_mode():
                if key not in self._recorded:
                    self._recorded[key] = self._made(network, parts, structure)
                    if len(self._recorded) > MOST_GRAPHS:
                        self._recorded.popitem(last=False)
                self._recorded.move_to_end(key)
                recorded = self._recorded[key]
                torch._foreach_copy_(recorded.inputs, given)
                recorded.replay()
            return recorded.result.clone()

    def __deepcopy__(self, memo: Any) -> "StepRunner":
        return StepRunner(compiled=self.compiled, graphs=self.graphs, record=self._record)

    def _compute(self, network: Any, *args: Any) -> Tensor:
        if not self.compiled:
            return network.denoise(*args)
        kind = type(network)
        if kind not in self._compiled_of:
            self._compiled_of[kind] = torch.compile(kind.denoise, dynamic=False)
        return self._compiled_of[kind](network, *args)

    def _made(self, network: Any, parts: list[Any], structure: Any) -> Recorded:
        own = [part.clone() if isinstance(part, Tensor) else part for part in parts]
        if self._pool is None and self._record is on_gpu:
            self._pool = torch.cuda.graph_pool_handle()
        with nullcontext() if self._record is not on_gpu else torch.cuda.device(parts[0].device):
            replay, result = self._record(lambda: self._compute(network, *tree_unflatten(own, structure)), self._pool)
        return Recorded([part for part in own if isinstance(part, Tensor)], replay, result)


def on_gpu(run: Run, pool: Any) -> tuple[Callable[[], Any], Tensor]:
    """`run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        result = run()
    return graph.replay, result


def network_state(network: nn.Module) -> str:
    """A digest of what a recorded step depends on besides its inputs: where the weights are, and all that is set."""
    state: list[Any] = []
    for module in network.modules():
        state.append((type(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
        state += [(name, setting(value)) for name, value in vars(module).items() if name not in USUAL]
        for weight in (*module._parameters.values(), *module._buffers.values()):
            if weight is not None:
                state.append((weight.data_ptr(), weight.dtype, weight.shape, weight.stride()))
    return hashlib.sha256(repr(state).encode()).hexdigest()


def setting(value: Any) -> Any:
    """A value of a module as it can be compared later: a plain one, or what holds such, by value; others by place."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(setting, value))
    if isinstance(value, dict):
        return tuple((name, setting(one)) for name, one in value.items())
    return id(value)
