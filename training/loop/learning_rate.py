"""The learning-rate schedule."""

import math

from latentdiff.training.settings import RunSettings


def learning_rate_at(settings: RunSettings, step: int) -> float:
    """Linear warm-up, constant, then a fall to zero over the last `decay_steps`. step: optimizer steps, from 0."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    left = min(1.0, max(0.0, (settings.max_steps - step) / settings.decay_steps)) if settings.decay_steps else 1.0
    decay = left if settings.decay_shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
    return settings.learning_rate * warmup * decay
