"""Each number beside its plot: rows of results as a terminal table, CSV, JSON, a picture, and in the logger.

`EvaluationCallback` is what the evaluations have in common; `attacks.py`, `deformations.py`, `calibration.py` and
`spectrum.py` say what is measured.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_manifold_mixup._step.host import Callback
from lightning_manifold_mixup._step.keys import Keys
from lightning_manifold_mixup.evaluation.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EvaluationCallback", "Row", "print_table", "scalars", "write_report"]

Row = dict[str, Any]
"""One line of a table. Texts say what was measured, numbers are the results, None is a result that does not apply."""


def write_report(rows: list[Row], path: str | Path, figure: Figure | None = None, **details: Any) -> list[Path]:
    """Write rows of results as CSV and JSON, and the figure as PNG.

    Args:
        rows: the results; all rows have the columns of the first.
        path: of the files, without suffix; the directory is made if need be.
        figure: drawn from the rows.
        details: what goes into the JSON only (curves, histograms), beside "rows". NaN becomes null there.

    Returns:
        The paths of the files.

    Example:
        >>> import tempfile
        >>> rows = [{"attack": "none", "accuracy": 0.9}, {"attack": "fgsm", "accuracy": 0.25}]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     table, _ = write_report(rows, f"{directory}/test_attacks", stage="test")
        ...     print(table.name, table.read_text().split())
        test_attacks.csv ['attack,accuracy', 'none,0.9', 'fgsm,0.25']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not `with_suffix`: the name may hold a dot of its own
    table, data, picture = (path.parent / f"{path.name}.{suffix}" for suffix in ("csv", "json", "png"))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    data.write_text(json.dumps(_without_nan({"rows": rows, **details}), indent=1) + "\n", encoding="utf-8")
    if figure is None:
        return [table, data]
    figure.savefig(picture, dpi=150)
    return [table, data, picture]


def _without_nan(value: Any) -> Any:
    """The value with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def print_table(rows: list[Row], title: str) -> None:
    """Print rows of results to the terminal; numbers have four decimals.

    Example:
        >>> print_table([{"attack": "fgsm", "accuracy": 0.25}], "test attacks")  # doctest: +NORMALIZE_WHITESPACE
           test attacks
        ┏━━━━━━━━┳━━━━━━━━━━┓
        ┃ attack ┃ accuracy ┃
        ┡━━━━━━━━╇━━━━━━━━━━┩
        │ fgsm   │   0.2500 │
        └────────┴──────────┘
    """
    table = require("rich.table", "cli").Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*("" if x is None else x if isinstance(x, str) else f"{x:.4f}" for x in row.values()))
    # wide enough for a table where the output is no terminal
    require("rich.console", "cli").Console(width=None if sys.stdout.isatty() else 120).print(table)


def scalars(rows: Iterable[Row]) -> dict[str, float]:
    """Name every number of the rows, as loggers want them.

    Example:
        >>> scalars([{"attack": "fgsm", "epsilon": "4/255", "accuracy": 0.25, "nll": None}])
        {'fgsm_4_255_accuracy': 0.25}
    """
    named = {}
    for row in rows:
        condition = [x for x in row.values() if isinstance(x, str)]
        named.update(
            {
                "_".join([*condition, column]).replace("/", "_").replace(" ", "_"): x
                for column, x in row.items()
                if x is not None and not isinstance(x, str)
            }
        )
    return named


def axes(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure (inches) with axes side by side, without pyplot: it opens no window and needs no closing."""
    figure: Figure = require("matplotlib.figure", "cli").Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def float64_device(device: torch.device) -> torch.device:
    """Where float64 metrics for a model on `device` go: there, or to the CPU where MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


class EvaluationCallback(Callback, ABC):
    """What evaluations on the batches of `trainer.validate` and `trainer.test` have in common.

    A subclass says what it measures on a batch (`update`), what it got (`compute`), and how that looks (`plot`). For
    that it has `record`, for means over all batches and ranks, and random numbers of its own in `self.generator`. With
    several dataloaders, the first is evaluated. `rows` are the results of the last run.

    Override `should_evaluate` to evaluate at other times and `logits` for a module whose forward does not give logits.

    Args:
        seed: of the callback's own generator; the same numbers are drawn in every run of the loop.
        dirname: where the files go; the logger's directory if None.
        input_key: where the images are in a batch: an index or a name, with dots for nested batches (`"labelled.0"`).
            None finds them, as `ManifoldMixupCallback` does.
        target_key: where the class indices are, likewise.
    """

    family: ClassVar[str]

    def __init__(
        self,
        seed: int = 0,
        dirname: str | None = None,
        input_key: int | str | None = None,
        target_key: int | str | None = None,
    ) -> None:
        self.seed = seed
        self.dirname = dirname
        self.input_key, self.target_key = input_key, target_key
        self._keys = Keys(input_key, target_key)
        self.means: dict[str, MeanMetric] = {}
        self.rows: list[Row] = []
        self.generator = torch.Generator()

    @abstractmethod
    def update(self, pl_module: L.LightningModule, images: Tensor, target: Tensor) -> None:
        """Measure one batch; `self.logits(pl_module, images)` gives the logits (n, classes)."""

    @abstractmethod
    def compute(self) -> tuple[list[Row], dict[str, Any]]:
        """Give the rows of results, and details that go to the JSON file only. Called on all ranks."""

    @abstractmethod
    def plot(self, rows: list[Row], details: dict[str, Any]) -> Figure:
        """Draw what `compute` gave. Called on rank 0."""

    def start(self) -> None:
        """Forget the last run. A subclass with metrics of its own forgets them here."""
        self.means = {}

    def record(self, key: str, values: Tensor) -> None:
        """Add values to the mean `self.means[key]`, which is taken over all batches and ranks."""
        if key not in self.means:
            self.means[key] = MeanMetric()
            self.means[key].set_dtype(torch.float32)  # under "16-true" the default is float16, which counts to 2048
            self.means[key].to(values.device)
        self.means[key].update(values)

    def should_evaluate(self, trainer: L.Trainer) -> bool:
        """By default not in the validation that is part of `fit`, for its cost."""
        return trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING)

    def logits(self, pl_module: L.LightningModule, images: Tensor) -> Tensor:
        """The module's logits (n, classes)."""
        logits = pl_module(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"{type(self).__name__} expected `{type(pl_module).__name__}.forward(images)` to give logits "
                f"(n, classes), got {got}: override `{type(self).__name__}.logits(pl_module, images)`"
            )
        return logits

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for module in ("matplotlib", "rich"):  # missed now rather than after an hour of attacks
            require(module, "cli")

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.should_evaluate(trainer):
            self.generator.manual_seed(self.seed + trainer.global_rank)
            self.start()

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.should_evaluate(trainer) and dataloader_idx == 0:
            places = self._keys.locate(batch)
            images, target = places.of(batch, places.require_inputs()[0]), places.of(batch, places.targets[0])
            with trainer.precision_plugin.forward_context():
                self.update(pl_module, images, target)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.should_evaluate(trainer):
            return
        name = f"{'test' if trainer.testing else 'val'}_{self.family}"
        rows, details = self.compute()
        self.rows = rows
        pl_module.log_dict({f"{name}/{key}": value for key, value in scalars(rows).items()}, sync_dist=True)
        if getattr(trainer, "fast_dev_run", False):
            return  # which leaves nothing behind
        dirname = trainer.log_dir if self.dirname is None else self.dirname  # `log_dir` needs all ranks: it broadcasts
        if trainer.is_global_zero:
            figure = self.plot(rows, details)
            write_report(rows, Path(dirname or ".") / name, figure, **details)
            if trainer.state.fn != TrainerFn.FITTING:
                print_table(rows, name.replace("_", " "))
            for logger in trainer.loggers:
                # TensorBoard's logger has it, under either name of Lightning
                add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
                if add_figure is not None:
                    add_figure(name, figure, trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
