"""Emoji in 32x32 pixels: an unconditional and a class-conditional denoiser, a classifier, and what guidance does."""
