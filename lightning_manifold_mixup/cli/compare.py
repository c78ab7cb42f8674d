"""``manifold-mixup compare``: none, input mixup and Manifold Mixup, on the same seeds, weights and batches.

Each run writes a result file into a folder of its own, whose name depends on everything that could change the numbers.
A run with a result file is not repeated, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.cli.methods import LABELS
from lightning_manifold_mixup.cli.runs import LAST, Result, Run, train, version, write
from lightning_manifold_mixup.cli.terminal import PROGRAM, RUNS, UsageError
from lightning_manifold_mixup.evaluation import (
    COLOURS,
    decimals_of,
    mean_and_std,
    plot_seeds,
    plus_minus,
    print_table,
    write_report,
)
from lightning_manifold_mixup.paper import recipes
from lightning_manifold_mixup.paper.quiet import quiet_lightning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = {
    "test/error": "error %",
    "test/teacher_error": "teacher's error %",
    "test/nll": "NLL",
    "test/ece": "ECE %",
    "test/rmse": "RMSE",
    "test/iou": "IoU %",
    # of a CalibrationCallback in the recipe
    "test_calibration/data_scaled_nll": "NLL, scaled",
    "test_calibration/data_scaled_ece": "ECE %, scaled",
    "test_calibration/data_scaled_brier": "Brier, scaled",
    "test_calibration/noise_auroc": "AUROC %, noise",
    "test_calibration/other_data_auroc": "AUROC %, other data",
}
"""The metrics that are compared, and what they are called; with a % they are shares."""


@quiet_lightning(logging.WARNING)  # no messages about device, seed and end of each training
def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what follows ``manifold-mixup compare``.
    """
    options, overrides = _parser().parse_known_args(args)
    methods, seeds = _methods(options.methods), _seeds(options.seeds)
    require("matplotlib", "cli")  # fail before the training if it is missing
    out = Path(options.out)
    runs = [
        Run(recipe, method, seed, tuple(overrides), out)
        for recipe in options.config or [recipes.DEFAULT]
        for seed in seeds
        for method in methods
    ]
    results: list[Result] = []
    try:
        for index, run in enumerate(runs, 1):
            results.append(_finish(run, f"[{index}/{len(runs)}] {run.title}"))
    except (KeyboardInterrupt, SystemExit):
        print(
            f"Stopped. The same command goes on from here: {len(results)} of {len(runs)} runs are done.",
            file=sys.stderr,
        )
        raise
    finally:
        if results:
            report(results, out / table_name(runs))


@rank_zero_only
def report(results: Sequence[Result], stem: Path) -> None:
    """Print the table, and write it, as ``stem`` with ``.csv``, ``.json`` and ``.png``."""
    rows = summary(results)
    print_summary(rows)
    files = write_report(rows, stem, plot(results), runs=list(results))
    print("Written: " + ", ".join(str(file) for file in files))


def table_name(runs: Sequence[Run]) -> str:
    """Name the files of a comparison, after all that was asked for: another comparison has files of its own.

    Example:
        >>> table_name([Run("digits", method, 0, (), Path("out")) for method in ("none", "manifold")])
        'compare-digits-none-manifold-0ba04a'
    """
    asked = json.dumps([[run.recipe, run.method, run.seed, run.overrides] for run in runs])
    labels = "-".join(dict.fromkeys([*(run.label for run in runs), *(run.method for run in runs)]))
    return f"compare-{labels[:80]}-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"


def _finish(run: Run, title: str) -> Result:
    """Return the result of a run, from its file or by training."""
    cli = run.prepare()
    key = run.key(cli)
    file = run.folder(key) / "result.json"
    if file.is_file():
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        _say(f"{title}: done before, {_numbers(result)}")
        return result
    _say(f"{title}: running")
    result = {"recipe": run.label, "method": run.method, "seed": run.seed, "key": key, "version": version()}
    result |= train(cli, run.folder(key))
    write(file, json.dumps(result, indent=1))
    _say(f"{title}: {_numbers(result)}, {result['seconds']:.0f} s")
    return result


# --------------------------------------------------------------------------------------------------- table and picture


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Average results over the seeds.

    Args:
        results: of runs.

    Returns:
        A row for each recipe, method and epoch at which the test set was evaluated: means, and standard deviations (of
        the sample) in columns that end in `` std``. Errors are in percent; what was not measured is None.
    """
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        for epoch in result["metrics"]:
            groups.setdefault((result["recipe"], result["method"], epoch), []).append(result)
    recipe_order = list(dict.fromkeys(result["recipe"] for result in results))
    rows = []
    for recipe, method, epoch in sorted(
        groups, key=lambda key: (recipe_order.index(key[0]), key[2] != LAST, list(LABELS).index(key[1]))
    ):
        group = groups[recipe, method, epoch]
        row: dict[str, Any] = {"recipe": recipe, "method": LABELS[method], "tested after": epoch}
        for metric in _compared(results):
            name = NUMBERS.get(metric, metric)
            row[name] = row[f"{name} std"] = None
            if any(metric in result["metrics"][epoch] for result in group):  # not all methods have a teacher
                values = [value_of(result, metric, epoch) for result in group]
                row[name], row[f"{name} std"] = mean_and_std(values)
        row["seconds a run"] = float(np.mean([result["seconds"] for result in group]))
        row["seeds"] = len(group)
        rows.append(row)
    return rows


def value_of(result: Result, metric: str, epoch: str = LAST) -> float:
    """Read one test metric of a result, shares in percent; NaN if it is missing."""
    value: float = result["metrics"][epoch].get(metric, math.nan)
    return 100 * value if "%" in NUMBERS.get(metric, "") else value


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of ``summary``, each mean beside its standard deviation."""
    table = [
        {
            name: plus_minus(value, row[f"{name} std"], decimals_of(name)) if f"{name} std" in row else value
            for name, value in row.items()
            if not name.endswith(" std")
        }
        | {"seconds a run": f"{row['seconds a run']:.0f}"}
        for row in rows
    ]
    print_table(table, "Test set, mean ± standard deviation over the seeds", section=itemgetter("recipe"))


def plot(results: Sequence[Result]) -> Figure:
    """Draw means as lines and seeds as dots.

    Args:
        results: of runs.

    Returns:
        A figure with a row of panels for each recipe; with one method alone, one row with a column for each recipe.
    """
    names = list(dict.fromkeys(result["recipe"] for result in results))
    methods = [method for method in LABELS if any(result["method"] == method for result in results)]
    metrics = _compared(results)
    columns = {
        name: [
            (LABELS[method], COLOURS[method], [r for r in results if r["recipe"] == name and r["method"] == method])
            for method in methods
        ]
        for name in names
    }
    if len(methods) == 1 and len(names) > 1:
        title = LABELS[methods[0]]
        columns = {title: [(name, colour, group) for name, [(_, colour, group)] in columns.items()]}
    width = max(3.4, 0.9 * max(map(len, columns.values())))
    size = (width * len(metrics), 0.6 + 2.6 * len(columns))
    figure: Figure = require("matplotlib.figure", "cli").Figure(figsize=size, layout="constrained")
    figure.suptitle("Test set after the last epoch: mean (line) and seeds (dots)")
    panels = figure.subplots(len(columns), len(metrics), squeeze=False)
    for (title, row), line in zip(columns.items(), panels, strict=True):
        for metric, panel in zip(metrics, line, strict=True):
            values = ((name, colour, [value_of(result, metric) for result in group]) for name, colour, group in row)
            groups = [(name, colour, [] if any(map(math.isnan, found)) else found) for name, colour, found in values]
            plot_seeds(panel, groups, f"{title}: {NUMBERS.get(metric, metric)}")
    return figure


def _compared(results: Sequence[Result]) -> list[str]:
    """Name the metrics to compare: error, NLL and ECE; if a module logs none of these, all that it logs in testing."""
    there = dict.fromkeys(key for result in results for key in result["metrics"][LAST])
    known = [metric for metric in NUMBERS if metric in there]
    return known or [metric for metric in there if metric.startswith("test")]


def _numbers(result: Result) -> str:
    return ", ".join(f"{NUMBERS.get(m, m)} {value_of(result, m):.4g}" for m in _compared([result]))


# ------------------------------------------------------------------------------------------------------------- helpers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} compare",
        description="Trains with no mixup, input mixup (alpha 1) and Manifold Mixup (as the recipe has it) on the same "
        "seeds: the same initial weights, the same batches in the same order. Finished runs are not repeated.",
        epilog="Further options, such as --trainer.max_epochs 5 or --data.init_args.data_dir DIR, override recipes; "
        "{seed} in them stands for the seed of the run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", action="append", metavar="RECIPE",
        help="name of a recipe, or a file; repeat it to compare on several; A+B lays B over A (default: digits)",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0,1,2", help="numbers, with commas between (default: 0,1,2)")
    parser.add_argument(
        "--methods",
        default=",".join(recipes.METHODS),
        help=f"some of {','.join(LABELS)}; the last adds the loss of the unmixed batch (default: %(default)s)",
    )
    parser.add_argument("--out", default=f"{RUNS}/compare", help="folder for results (default: %(default)s)")
    return parser


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    unknown = [method for method in methods if method not in LABELS]
    if unknown:
        raise UsageError(f"Expected --methods among {','.join(LABELS)}, got {text!r}.")
    return methods


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise UsageError(f"Expected --seeds to be numbers with commas between, such as 0,1,2, got {text!r}.") from None


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
