"""Diffusion mathematics: the contract of a process, Gaussian diffusion, schedules, losses, guidance, samplers."""

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.likelihood import bits_per_dimension
from latentdiff.diffusion.losses import training_losses
from latentdiff.diffusion.process import Process
from latentdiff.diffusion.processes import (
    build_scheduler,
    known_processes,
    process_from_config,
    process_of,
    register_process,
    scheduler_config,
)
from latentdiff.diffusion.respacing import space_timesteps
from latentdiff.diffusion.schedules import make_betas, rescale_zero_terminal_snr
from latentdiff.diffusion.timesteps import LossSecondMoment

__all__ = [
    "GaussianDiffusion",
    "LossSecondMoment",
    "Process",
    "bits_per_dimension",
    "build_scheduler",
    "known_processes",
    "make_betas",
    "process_from_config",
    "process_of",
    "register_process",
    "rescale_zero_terminal_snr",
    "scheduler_config",
    "space_timesteps",
    "training_losses",
]
