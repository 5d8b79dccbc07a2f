"""What stands for a CUDA graph on a processor: a function that is run again, into where its result was."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Recorder:
    """For `StepRunner`'s `record`.

    Attributes:
        count: how often something was recorded.
    """

    count = 0

    def __call__(self, run: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], Any], Tensor]:
        self.count += 1
        result = run().clone()
        return lambda: result.copy_(run()), result
