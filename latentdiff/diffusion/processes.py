"""The processes that a scheduler's config can name."""

from collections.abc import Mapping
from typing import Any

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.process import Process

_PROCESSES: list[type[Process]] = [GaussianDiffusion]


def register_process(process: type[Process]) -> type[Process]:
    """Make a process known, before those that are known already; also a class decorator."""
    if process not in _PROCESSES:
        _PROCESSES.insert(0, process)
    return process


def known_processes() -> dict[str, type[Process]]:
    """The processes by their names."""
    return {process.name: process for process in _PROCESSES}


def process_class(config: Mapping[str, Any]) -> type[Process]:
    """The class of the process that a scheduler with this config samples from.

    Gaussian diffusion where none fits: its ``from_scheduler_config`` says what is wrong.
    """
    return next((process for process in _PROCESSES if process.fits(config)), GaussianDiffusion)


def process_from_config(config: Mapping[str, Any]) -> Process:
    """The process that a scheduler with this config samples from, from the config alone.

    Raises:
        ValueError: there is none that is known; the message names the key.
    """
    return process_class(config).from_scheduler_config(config)


def process_of(scheduler: Any) -> Process:
    """The process that a scheduler samples from, with the scheduler's own tables.

    Raises:
        ValueError: there is none that is known.
    """
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}  # in memory a config has no class
    return process_class(config).from_scheduler(scheduler)


def scheduler_config(process: Process) -> dict[str, Any]:
    """The settings that a diffusers scheduler needs to sample from `process`."""
    return process.scheduler_config()


def build_scheduler(process: Process, name: str = "DDIMScheduler") -> Any:
    """The diffusers scheduler class `name` for `process`; see `Process.scheduler`."""
    return process.scheduler(name)
