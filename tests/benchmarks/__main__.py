"""Run all benchmarks, or some: ``python -m tests.benchmarks [SECTION ...] [--plot PNG]``.

From the root of the repository; about ten minutes on one core. All numbers are ratios of medians of things done in turn
in one process, unless a unit is given.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import bench_layers, growth, imports, mix, overhead, self_check, step
from .measure import Measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="section",
        help="mix, step, overhead, self_check, layers, growth, imports; all if none",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="1: processor time, for shared machines; more: wall clock"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the mix and of growth")
    parser.add_argument("--rounds", type=int, default=3, help="fits of each kind")
    parser.add_argument("--plot", type=Path, help="where to save the plot of growth, a PNG")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure = Measure(arguments.device, arguments.seconds)
    sections = {
        "mix": partial(mix.run, measure),
        "step": partial(step.run, measure, arguments.rounds),
        "overhead": partial(overhead.run, measure, arguments.rounds),
        "self_check": partial(self_check.run, measure, arguments.rounds),
        "layers": partial(bench_layers.run, measure, arguments.rounds),
        "growth": partial(growth.run, measure, arguments.plot),
        "imports": partial(imports.run, measure),
    }
    unknown = set(arguments.sections) - sections.keys()
    if unknown:
        parser.error(f"expected sections among {', '.join(sections)}, got {', '.join(sorted(unknown))}")
    for name in arguments.sections or sections:
        section = sections[name]()
        table = Table(
            *map(escape, section.columns), title=section.title, caption=escape(section.notes), caption_justify="left"
        )
        for row in section.rows:
            table.add_row(*map(escape, row))
        Console(width=None if Console().is_terminal else 140).print(table)


if __name__ == "__main__":
    main()
