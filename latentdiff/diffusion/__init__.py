"""Diffusion mathematics: noise schedules, the Gaussian process, its losses, guidance, and the matching samplers."""

from latentdiff.diffusion.gaussian import GaussianDiffusion
from latentdiff.diffusion.schedulers import build_scheduler, scheduler_config
from latentdiff.diffusion.schedules import make_betas, rescale_zero_terminal_snr

__all__ = ["GaussianDiffusion", "build_scheduler", "make_betas", "rescale_zero_terminal_snr", "scheduler_config"]
