"""This process and the others of the same run, by Accelerate."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

LONG = timedelta(days=7)  # drawing processes may end far apart


def several() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_cpu() -> bool:
    """Whether to compute on the CPU: asked for by Accelerate's configuration, or several processes without a device.

    By default Accelerate would take the latter for separate programs. DeepSpeed it uses only if not asked for the CPU.
    """
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or (_without_devices() and not by_deepspeed())


def by_deepspeed() -> bool:
    """Whether Accelerate's configuration asks for DeepSpeed."""
    return bool(parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


def _without_devices() -> bool:
    return several() and not torch.accelerator.is_available()


def processes(cpu: bool = False, **options: Any) -> PartialState:
    """This process among the others; may be asked before there is an Accelerator.

    Args:
        cpu: compute on the CPU in any case.
        options: of torch's ``init_process_group``, where there is no group yet.
    """
    if by_deepspeed() and _without_devices():
        options = {"backend": "gloo", **options}  # Accelerate knows one for DeepSpeed's devices only
    return PartialState(cpu=cpu or on_cpu(), **options)


def drawing_processes(cpu: bool) -> PartialState | None:
    """This process among those that share a drawing; None: it is alone."""
    return processes(cpu, timeout=LONG) if several() else None
