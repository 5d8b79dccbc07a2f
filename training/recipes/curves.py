"""Draw what runs recorded, one panel for each figure and one line for each run.

    python -m latentdiff.training.recipes.curves runs/kl-f8 runs/vq-f4 --figures psnr l1 codes_in_use -o curves.png

Reads ``training/metrics.jsonl`` of each; the figures' names are those in it. matplotlib is needed
(``pip install -e ".[recipes]"``).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def read_curve(run: Path, figure: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, where it was recorded.

    Raises:
        FileNotFoundError: that is no run.
    """
    file = run / "training" / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the output folder of a run")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [(row["step"], row[figure]) for row in rows if row.get(figure) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_curves(runs: Sequence[Path], figures: Sequence[str], output: Path) -> None:
    """Write a PNG.

    Raises:
        FileNotFoundError: one is no run.
        ValueError: no run has a figure.
    """
    curves = {figure: {run.name: read_curve(run, figure) for run in runs} for figure in figures}
    for figure, lines in curves.items():
        if not any(steps for steps, _ in lines.values()):
            raise ValueError(f"no run has {figure!r}")
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(4.5 * len(figures), 3.4), layout="constrained")
    for axes, (figure, lines) in zip(sheet.subplots(1, len(figures), squeeze=False)[0], curves.items(), strict=True):
        for name, (steps, values) in lines.items():
            if steps:
                axes.plot(steps, values, label=name, marker="o" if len(steps) < 40 else None, markersize=3)
        axes.set(title=figure, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    sheet.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of runs")
    parser.add_argument("--figures", nargs="+", default=["loss"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw_curves(arguments.runs, arguments.figures, arguments.output)


if __name__ == "__main__":
    main()
