"""The processes of one training, as Accelerate sees them."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Whether to compute on the CPU: asked for by Accelerate's configuration, or several processes without a device.

    Without being told, Accelerate takes the latter for trainings that know nothing of each other.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or (several and not torch.accelerator.is_available())


def processes() -> PartialState:
    """This process among the others; may be asked before there is an Accelerator."""
    return PartialState(cpu=on_cpu())
