"""``latentdiff average``."""

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.terminal import say


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a training with ema_snapshots.")],
    length: Annotated[float, typer.Option(help="Over which share of the run, as a standard deviation; 0.05 to 0.28.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model; new.")],
    step: Annotated[
        int | None, typer.Option(help="As if the run had ended there; one at which averages were kept.")
    ] = None,
) -> None:
    """Make a model of the averages of a run's weights, of a length chosen after training.

    latentdiff train denoiser ... --output runs/mine ema_snapshots=500

    latentdiff average runs/mine --length 0.1 --output runs/mine-0.1

    The run is not changed. 'latentdiff evaluate' says which length is the best.
    """
    from latentdiff.training.trainers.average import average as write

    missed = write(run.expanduser(), length, output.expanduser(), step)
    say(f"{output} is the model averaged over {length:g} of the run (within {100 * missed:.2g} % of the profile)")
