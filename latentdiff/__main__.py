"""``python -m latentdiff`` and ``accelerate launch -m latentdiff``."""

from latentdiff.cli import main

main()
