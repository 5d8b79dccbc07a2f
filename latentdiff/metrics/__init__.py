"""Metrics of generated pictures: similarity of two, of two sets, and of pictures to their captions."""

from latentdiff.metrics.distribution_distances import frechet_distance, kernel_distance, precision_recall
from latentdiff.metrics.pixels import psnr, ssim

__all__ = ["frechet_distance", "kernel_distance", "precision_recall", "psnr", "ssim"]
