"""``python -m latentdiff.training`` and ``accelerate launch -m latentdiff.training``."""

from latentdiff.cli import run
from latentdiff.training.cli import launched

run(launched)
