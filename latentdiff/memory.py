"""What to do where memory does not suffice: a processor's or a GPU's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
DRAWING = (
    "draw fewer pictures at once or smaller ones; on a GPU, load the model with dtype=torch.float16 and draw with "
    "pipeline.enable_model_cpu_offload(), or enable_sequential_cpu_offload(), which takes least; if only decoding is "
    "too much, pipeline.vae.enable_slicing() or enable_tiling()"
)
TRAINING = (
    "lower batch_size (gradient_accumulation_steps makes up for it) or resolution, or set gradient_checkpointing=true, "
    "mixed_precision=bf16 or optimizer=adamw8bit; a LoRA takes less than all weights"
)


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory could not be had."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Within, an error for lack of memory gets `advice` as a note, which tracebacks and the command line show."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_lack_of_memory(error) and not getattr(error, "__notes__", ()):
            error.add_note(advice)
        raise
