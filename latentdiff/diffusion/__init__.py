"""Diffusion mathematics: the contract of a process, Gaussian diffusion, noise schedules, losses, guidance, samplers."""

from latentdiff.diffusion.betas import make_betas, rescale_zero_terminal_snr
from latentdiff.diffusion.flow import RectifiedFlow
from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.losses import bits_per_dimension, training_losses
from latentdiff.diffusion.process import (
    Process,
    Target,
    build_scheduler,
    known_processes,
    process_from_config,
    process_of,
    register_process,
)
from latentdiff.diffusion.timesteps import LossSecondMoment, space_timesteps

__all__ = [
    "GaussianDiffusion",
    "LossSecondMoment",
    "Process",
    "RectifiedFlow",
    "Target",
    "bits_per_dimension",
    "build_scheduler",
    "known_processes",
    "make_betas",
    "process_from_config",
    "process_of",
    "register_process",
    "rescale_zero_terminal_snr",
    "space_timesteps",
    "training_losses",
]
