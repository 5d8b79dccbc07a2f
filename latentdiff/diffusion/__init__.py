"""Diffusion mathematics: noise schedules, the Gaussian process, its losses, guidance, and the matching samplers."""

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.likelihood import bits_per_dimension
from latentdiff.diffusion.losses import training_losses
from latentdiff.diffusion.respacing import space_timesteps
from latentdiff.diffusion.schedulers import build_scheduler, scheduler_config
from latentdiff.diffusion.schedules import make_betas, rescale_zero_terminal_snr
from latentdiff.diffusion.timesteps import LossSecondMoment

__all__ = [
    "GaussianDiffusion",
    "LossSecondMoment",
    "bits_per_dimension",
    "build_scheduler",
    "make_betas",
    "rescale_zero_terminal_snr",
    "scheduler_config",
    "space_timesteps",
    "training_losses",
]
