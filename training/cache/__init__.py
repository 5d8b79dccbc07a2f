"""What the frozen networks make of pictures and captions, encoded once and kept on disk."""

from latentdiff.training.cache.latents import LatentCache
from latentdiff.training.cache.store import TensorStore
from latentdiff.training.cache.text import TextCache

__all__ = ["LatentCache", "TensorStore", "TextCache"]
