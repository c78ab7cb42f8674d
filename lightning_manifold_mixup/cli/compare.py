"""`manifold-mixup compare`: none, input mixup and Manifold Mixup, on the same seeds, weights and batches.

Each run ends with a result file in a folder of its own, named after everything that could change the numbers. A run
whose file is there is not repeated, so that an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup.callback import ManifoldMixupCallback
from lightning_manifold_mixup.cli.app import PROGRAM, ManifoldMixupCLI, UsageError, class_of, console
from lightning_manifold_mixup.evaluation import write_report
from lightning_manifold_mixup.paper import recipes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"none": "no mixup", "input": "input mixup", "manifold": "Manifold Mixup"}
NUMBERS = {
    "test/error": "error %",
    "test/teacher_error": "teacher's error %",
    "test/nll": "NLL",
    "test/ece": "ECE %",
}
"""The metrics that are compared, and what they are called."""

LAST, BEST = "last epoch", "best val epoch"

_PERCENT = ("test/error", "test/teacher_error", "test/ece")
_ALPHAS = ("alpha", "alpha_labelled", "alpha_unlabelled")
_NO_MATTER = (
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
)
"""Options of the Trainer that change no number."""

Result = dict[str, Any]


def main(args: Sequence[str]) -> None:
    """Runs the command.

    Args:
        args: what follows ``manifold-mixup compare``.
    """
    options, overrides = _parser().parse_known_args(args)
    methods, seeds = _methods(options.methods), _seeds(options.seeds)
    require("matplotlib", "cli")  # missed now rather than after an hour of training
    for name in ("lightning.pytorch", "lightning.fabric"):  # device, seed, end of training: nine times over
        logging.getLogger(name).setLevel(logging.WARNING)
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
            report(results, out)


@rank_zero_only
def report(results: Sequence[Result], out: Path) -> None:
    """Prints the table, and writes ``compare.csv``, ``compare.json`` and ``compare.png`` into a folder."""
    rows = summary(results)
    print_table(rows)
    files = write_report(rows, out / "compare", plot(results), runs=list(results))
    print("Written: " + ", ".join(str(file) for file in files))


# --------------------------------------------------------------------------------------------------------------- a run


class Prepared(ManifoldMixupCLI):
    """A parsed configuration, of which nothing has been made yet."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name in ("--ckpt_path", "--weights_only"):  # in the files that `fit --print_config` writes
            parser.add_argument(name, default=None)

    @override
    def instantiate_classes(self) -> None:
        pass

    def make(self) -> None:
        """Makes trainer, model and data, from the seed on."""
        seed_everything(self.config.seed_everything, workers=True, verbose=False)
        super().instantiate_classes()


@dataclass(frozen=True)
class Run:
    """One training of one method with one seed.

    Args:
        recipe: name or file, as :func:`lightning_manifold_mixup.paper.recipes.layers_of` takes it.
        method: ``"none"``, ``"input"`` or ``"manifold"``.
        seed: for ``seed_everything``.
        overrides: further options of the command line, for all runs; ``{seed}`` in them stands for the seed.
        out: folder of the comparison.
    """

    recipe: str
    method: str
    seed: int
    overrides: tuple[str, ...]
    out: Path

    @property
    def label(self) -> str:
        """The recipe's name without folder, suffix and method."""
        label = "+".join(Path(part).name.removesuffix(".yaml") for part in self.recipe.split("+"))
        return recipes.with_method(label, "").replace("--", "-").rstrip("-") if recipes.is_row(label) else label

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.label}, {LABELS[self.method]}, seed {self.seed}"

    def prepare(self) -> Prepared:
        """Parses the recipe and sets method and seed."""
        name = self.recipe
        if recipes.is_row(name):  # the paper's rows say themselves what each method is there
            name = recipes.with_method(name, self.method)
        overrides = [option.replace("{seed}", str(self.seed)) for option in self.overrides]
        cli = Prepared(["--config", name, *overrides], run=False)
        if not recipes.is_row(name):
            set_method(cli.config, self.method)
        cli.config.seed_everything = self.seed
        cli.config.trainer.logger = False
        return cli

    def key(self, cli: Prepared) -> str:
        """What the numbers depend on, in eight letters: the whole configuration, and the version of this package."""
        config = yaml.safe_load(cli.parser.dump(cli.config))
        for name in _NO_MATTER:
            config["trainer"].pop(name, None)
        text = json.dumps([_version(), config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def folder(self, key: str) -> Path:
        """Where the run's files are."""
        return self.out / "runs" / f"{self.label}-{self.method}-seed{self.seed}-{key}"


def set_method(config: Any, method: str) -> None:
    """Turns a parsed configuration with Manifold Mixup into that of another method.

    Args:
        config: with a :class:`~lightning_manifold_mixup.ManifoldMixupCallback` among the Trainer's callbacks, or a
            model that has ``alpha`` (or ``alpha_labelled`` and ``alpha_unlabelled``) and ``layers``, as the modules of
            this package have.
            Changed in place.
        method: ``"none"``: no mixing. ``"input"``: alpha 1 at the input. ``"manifold"``: as the configuration has it.

    Raises:
        UsageError: if the configuration has no Manifold Mixup.
    """
    callbacks = config.trainer.callbacks or []
    found = [c for c in callbacks if class_of(c.class_path, Callback) is ManifoldMixupCallback]
    place = found[0].init_args if found else config.model.get("init_args")
    alphas = [name for name in _ALPHAS if place is not None and name in place]
    if not alphas or "layers" not in place or not any(place[name] for name in alphas):
        raise UsageError(
            "Nothing to compare: the recipe has no Manifold Mixup. Give it a ManifoldMixupModule, or a "
            "ManifoldMixupCallback in trainer.callbacks, with alpha above 0."
        )
    if method == "manifold":
        return
    for name in alphas:
        place[name] = 0.0 if method == "none" else 1.0
    if method == "input":
        place.layers = ["input"]


def _finish(run: Run, title: str) -> Result:
    """The result of a run, from its file or by running it."""
    cli = run.prepare()
    key = run.key(cli)
    file = run.folder(key) / "result.json"
    if file.is_file():
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        _say(f"{title}: done before, {_numbers(result)}")
        return result
    _say(f"{title}: running")
    result = {"recipe": run.label, "method": run.method, "seed": run.seed, "key": key, "version": _version()}
    result |= train(cli, run.folder(key))
    _write(file, json.dumps(result, indent=1))
    _say(f"{title}: {_numbers(result)}, {result['seconds']:.0f} s")
    return result


def train(cli: Prepared, folder: Path) -> Result:
    """Trains and tests a configuration.

    Args:
        cli: the configuration.
        folder: for its logs, its configuration (``config.yaml``) and the trained weights (``last.ckpt``).

    Returns:
        Test metrics after the last epoch and, if there was a validation with an error or loss, after the epoch that was
        best there; the validation metrics of each epoch; seconds of training, and of all.
    """
    started = time.perf_counter()
    _clear(folder)
    trainer_config = cli.config.trainer
    trainer_config.default_root_dir = str(folder)
    trainer_config.enable_progress_bar = sys.stdout.isatty()
    trainer_config.enable_model_summary = False
    if not any("Checkpoint" in c.class_path for c in trainer_config.callbacks or []):
        trainer_config.enable_checkpointing = False
    cli.save_config_callback = None
    cli.make()
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    trainer.logger = CSVLogger(folder, name="log", version="", flush_logs_every_n_steps=1000)
    history = History()
    trainer.callbacks.append(history)  # type: ignore[attr-defined]
    _write(folder / "config.yaml", cli.parser.dump(cli.config))

    begun = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - begun
    metrics = {LAST: _test(trainer, model, data)}
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
    if history.best_state is not None:
        model.load_state_dict(history.best_state)
        metrics[BEST] = _test(trainer, model, data)
    return {
        "metrics": metrics,
        "best_epoch": history.best_epoch,
        "validation": history.epochs,
        "epochs": trainer.current_epoch,
        "seconds": seconds,
        "seconds_in_all": time.perf_counter() - started,
        "torch": torch.__version__,
    }


class History(Callback):
    """Validation metrics of every epoch, and the weights of the best one.

    Attributes:
        epochs: the metrics, by epoch.
        best_epoch: the one with the lowest ``val/error`` (or ``val/loss``, or ``val_loss``); None without validation.
        best_state: the module's state then.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.best_epoch: int | None = None
        self.best_state: dict[str, Any] | None = None
        self._lowest = math.inf

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
        self.epochs.append({"epoch": trainer.current_epoch, **metrics})
        value = next((metrics[k] for k in ("val/error", "val/loss", "val_loss") if k in metrics), None)
        if value is not None and value < self._lowest:
            self._lowest, self.best_epoch = value, trainer.current_epoch
            self.best_state = deepcopy(pl_module.state_dict())


def _test(trainer: Trainer, model: LightningModule, data: Any) -> dict[str, float]:
    trainer.test(model, datamodule=data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


# --------------------------------------------------------------------------------------------------- table and picture


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Mean and standard deviation (of the sample) over the seeds.

    Args:
        results: of runs.

    Returns:
        A row for each recipe, method and epoch at which the test set was evaluated; errors in percent, None for what
        was not measured.
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
            if any(
                metric in result["metrics"][epoch] for result in group
            ):  # the error of a teacher, where there is one
                values = [value_of(result, metric, epoch) for result in group]
                row[name] = float(np.mean(values))
                row[f"{name} std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        row["seconds a run"] = float(np.mean([result["seconds"] for result in group]))
        row["seeds"] = len(group)
        rows.append(row)
    return rows


def value_of(result: Result, metric: str, epoch: str = LAST) -> float:
    """One test metric of a result, errors in percent."""
    value: float = result["metrics"][epoch].get(metric, math.nan)
    return 100 * value if metric in _PERCENT else value


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of :func:`summary`."""
    numbers = [name for name in rows[0] if f"{name} std" in rows[0]]
    texts = ["recipe", "method", "tested after"]
    table = require("rich.table", "cli").Table(title="Test set, mean ± standard deviation over the seeds")
    for name in texts:
        table.add_column(name, overflow="fold")  # of a name in a narrow terminal no letter is lost
    for name in [*numbers, "seconds a run", "seeds"]:
        table.add_column(name, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [_spread(row[name], row[f"{name} std"]) for name in numbers]
        end = following is None or following["recipe"] != row["recipe"]
        table.add_row(
            *(row[name] for name in texts), *cells, f"{row['seconds a run']:.0f}", str(row["seeds"]), end_section=end
        )
    console().print(table)


def plot(results: Sequence[Result]) -> Figure:
    """Bars for means, dots for seeds: a row of panels for each recipe, or a bar for each if there is but one method."""
    figures = require("matplotlib.figure", "cli")
    names = list(dict.fromkeys(result["recipe"] for result in results))
    methods = [method for method in LABELS if any(result["method"] == method for result in results)]
    metrics = _compared(results)
    colours = dict(zip(LABELS, ("#8c8c8c", "#e69f00", "#0072b2"), strict=True))
    bars = {
        name: [
            (LABELS[method], colours[method], [r for r in results if r["recipe"] == name and r["method"] == method])
            for method in methods
        ]
        for name in names
    }
    if len(methods) == 1 and len(names) > 1:
        title = LABELS[methods[0]]
        bars = {title: [(name, colour, group) for name, [(_, colour, group)] in bars.items()]}
    width = max(3.4, 0.9 * max(map(len, bars.values())))
    figure = figures.Figure(figsize=(width * len(metrics), 0.6 + 2.6 * len(bars)), layout="constrained")
    figure.suptitle("Test set after the last epoch: mean (bar) and seeds (dots)")
    panels = figure.subplots(len(bars), len(metrics), squeeze=False)
    for (title, row), line in zip(bars.items(), panels, strict=True):
        for metric, panel in zip(metrics, line, strict=True):
            for position, (_, colour, group) in enumerate(row):
                values = [value_of(result, metric) for result in group]
                if not values or any(map(math.isnan, values)):
                    continue
                mean = float(np.mean(values))
                panel.bar(position, mean, width=0.7, color=colour)
                panel.scatter([position] * len(values), values, s=14, color="black", zorder=3)
                panel.annotate(
                    f"{mean:.3g}", (position, max(values)), (0, 4), textcoords="offset points", ha="center", fontsize=9
                )
            panel.margins(y=0.15)
            panel.set_xlim(-0.6, len(row) - 0.4)
            panel.set_ylim(bottom=0)
            labels = [label.replace(" ", "\n", 1).replace("-", "-\n") for label, *_ in row]
            panel.set_xticks(range(len(row)), labels, fontsize=9)
            panel.set_title(f"{title}: {NUMBERS.get(metric, metric)}", fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
    return figure  # type: ignore[no-any-return]


def _compared(results: Sequence[Result]) -> list[str]:
    """The metrics to compare: error, NLL and ECE; for modules that log none of these, whatever they log in testing."""
    there = dict.fromkeys(key for result in results for key in result["metrics"][LAST])
    known = [metric for metric in NUMBERS if metric in there]
    return known or [metric for metric in there if metric.startswith("test")]


def _spread(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return ""
    digits = 2 if abs(mean) >= 1 else 3
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


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
    parser.add_argument("--methods", default=",".join(LABELS), help=f"some of {','.join(LABELS)} (default: all)")
    parser.add_argument(
        "--out", default="manifold_mixup_runs/compare", help="folder for results (default: %(default)s)"
    )
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


@rank_zero_only
def _write(file: Path, text: str) -> None:
    """Writes a file at once: it is there in full or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


@rank_zero_only
def _clear(folder: Path) -> None:
    """Removes what an interrupted run has left."""
    shutil.rmtree(folder, ignore_errors=True)


def _version() -> str:
    from lightning_manifold_mixup import __version__

    return __version__
