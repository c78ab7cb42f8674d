"""``manifold-mixup figure spirals|bottleneck|spectrum``: the paper's figures about hidden states."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.cli.terminal import PROGRAM, RUNS
from lightning_manifold_mixup.evaluation import print_table, write_report

FIGURES = {
    "spirals": "Figure 1: decision boundary, hidden states and singular values of seven ways to train",
    "bottleneck": "Figure 2: digits in a bottleneck of two dimensions, without mixup, with input and Manifold Mixup",
    "spectrum": "flattening: singular values of each class's hidden states, on digits",
}
"""Each figure's name (also its module's in ``lightning_manifold_mixup.paper.figures``) and what it shows."""


def main(args: Sequence[str]) -> None:
    """Train, print a table, and write ``NAME.png``, ``NAME.csv`` and ``NAME.json``.

    Args:
        args: what follows ``manifold-mixup figure``.
    """
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} figure", description="Draw one of the paper's figures: train, measure, plot."
    )
    names = parser.add_subparsers(dest="figure", metavar="FIGURE", required=True)
    for name, text in FIGURES.items():
        module = import_module(f"lightning_manifold_mixup.paper.figures.{name}")
        options = names.add_parser(name, help=text, description=module.__doc__)
        options.formatter_class = argparse.RawDescriptionHelpFormatter
        options.add_argument(
            "--seeds", type=_positive, default=module.SEEDS, help="trainings per method (default: %(default)s)"
        )
        options.add_argument(
            "--epochs", type=_positive, default=module.EPOCHS, help="of each training (default: %(default)s)"
        )
        options.add_argument("--out", type=Path, default=Path(RUNS), help="folder of the files (default: %(default)s)")
    chosen = parser.parse_args(args)
    for package in ("matplotlib", "rich", "sklearn"):  # fail before the training if one is missing
        require(package, "cli")

    report = import_module(f"lightning_manifold_mixup.paper.figures.{chosen.figure}").make(chosen.epochs, chosen.seeds)
    for title, table in report.tables.items():
        print_table(table, title)
    paths = write_report(report.rows, chosen.out / chosen.figure, report.figure, **report.details)
    print("written:", *paths)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
