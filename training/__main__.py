"""``python -m latentdiff.training`` and ``accelerate launch -m latentdiff.training``."""

from latentdiff.__main__ import heed_interrupts


def main() -> None:
    heed_interrupts()
    from latentdiff.cli import run
    from latentdiff.training.cli import launched

    run(launched)


if __name__ == "__main__":
    main()
