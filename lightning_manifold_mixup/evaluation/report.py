"""Reports of results: the rows as a table, as CSV and JSON, as a picture, and in the logger.

``EvaluationCallback`` has what all evaluations share. What is measured is in ``attacks.py``, ``deformations.py``,
``calibration.py`` and ``spectrum.py``.
"""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import TypedDict, override

from lightning_manifold_mixup._step.batch.keys import Keys
from lightning_manifold_mixup._step.extras import require
from lightning_manifold_mixup._step.host import Callback
from lightning_manifold_mixup.evaluation.tables import Row, print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EvaluationCallback", "EvaluationOptions", "Row", "scalars", "write_report"]


def write_report(rows: list[Row], path: str | Path, figure: Figure | None = None, **details: Any) -> list[Path]:
    """Write rows of results as CSV and JSON, and the figure as PNG.

    Args:
        rows: the results; all rows have the columns of the first.
        path: of the files, without suffix; a missing directory is created.
        figure: drawn from the rows.
        details: further entries of the JSON file, beside "rows" (curves, histograms). NaN becomes null there.

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
    # ``with_suffix`` would cut off the end of a name that has a dot.
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
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def scalars(rows: Iterable[Row]) -> dict[str, float]:
    """Give every number of the rows a name for loggers.

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


class EvaluationOptions(TypedDict, total=False):
    """What ``EvaluationCallback`` takes, for the signatures of its subclasses; it says what each is."""

    seed: int
    dirname: str | None
    input_key: int | str | None
    target_key: int | str | None
    verbose: bool


class EvaluationCallback(Callback, ABC):
    """Base class of evaluations on the batches of ``trainer.validate`` and ``trainer.test``.

    A subclass measures one batch in ``update``, returns the results in ``compute`` and draws them in ``plot``. It may
    call ``record`` to average over all batches and ranks, and draw random numbers from ``self.generator``. If there are
    several dataloaders, only the first is evaluated. ``rows`` are the results of the last run.

    Override ``should_evaluate`` to evaluate at other times and ``logits`` for a module whose forward does not give
    logits.

    Args:
        seed: of the callback's own generator; every run draws the same numbers.
        dirname: where the files go; the logger's directory if None.
        input_key: where the images are in a batch: an index or a name, with dots for nested batches (``"labelled.0"``).
            None finds them, as ``ManifoldMixupCallback`` does.
        target_key: where the class indices are, likewise.
        verbose: whether to print the table.

    Example:
        >>> class Brightness(EvaluationCallback):
        ...     family = "brightness"
        ...     def update(self, pl_module, images, target):
        ...         self.record("mean", images.flatten(1).mean(1))
        ...     def compute(self):
        ...         return [{"mean": self.means["mean"].compute().item()}], {}
        ...     def plot(self, rows, details):
        ...         return axes(1, 3, 3)[0]
        >>> callback = Brightness()
        >>> callback.update(None, torch.ones(2, 1, 4, 4), torch.zeros(2))
        >>> callback.compute()
        ([{'mean': 1.0}], {})
    """

    family: ClassVar[str]

    def __init__(
        self,
        seed: int = 0,
        dirname: str | None = None,
        input_key: int | str | None = None,
        target_key: int | str | None = None,
        verbose: bool = True,
    ) -> None:
        self.seed = seed
        self.verbose = verbose
        self.dirname = dirname
        self.input_key, self.target_key = input_key, target_key
        self._keys = Keys(input_key, target_key)
        self.means: dict[str, MeanMetric] = {}
        self.rows: list[Row] = []
        self.generator = torch.Generator()

    @abstractmethod
    def update(self, pl_module: L.LightningModule, images: Tensor, target: Tensor) -> None:
        """Measure one batch; ``self.logits(pl_module, images)`` returns the logits (n, classes)."""

    @abstractmethod
    def compute(self) -> tuple[list[Row], dict[str, Any]]:
        """Return the rows of results, and details for the JSON file. Called on all ranks."""

    @abstractmethod
    def plot(self, rows: list[Row], details: dict[str, Any]) -> Figure:
        """Draw the results of ``compute``. Called on rank 0."""

    def start(self) -> None:
        """Reset what the last run has recorded. A subclass with metrics of its own resets them here, too."""
        self.means = {}

    def record(self, key: str, values: Tensor) -> None:
        """Add values to the mean ``self.means[key]``, which is taken over all batches and ranks."""
        if key not in self.means:
            self.means[key] = MeanMetric()
            # The default under "16-true" is float16, which cannot count above 2048.
            self.means[key].set_dtype(torch.float32)
            self.means[key].to(values.device)
        self.means[key].update(values)

    def should_evaluate(self, trainer: L.Trainer) -> bool:
        """Decide whether to evaluate; by default not in the validation during ``fit``, because of the cost."""
        return trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING)

    def logits(self, pl_module: L.LightningModule, images: Tensor) -> Tensor:
        """Return the module's logits (n, classes)."""
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
        for module in ("matplotlib", "rich"):  # fail before the work if one of them is missing
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
            images, target = self.entries(batch)
            with trainer.precision_plugin.forward_context():
                self.update(pl_module, images, target)

    def entries(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the images and the class indices of a batch."""
        places = self._keys.locate(batch)
        return places.of(batch, places.require_inputs()[0]), places.of(batch, places.targets[0])

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.should_evaluate(trainer):
            return
        name = f"{'test' if trainer.testing else 'val'}_{self.family}"
        rows, details = self.compute()
        self.rows = rows
        pl_module.log_dict({f"{name}/{key}": value for key, value in scalars(rows).items()}, sync_dist=True)
        if getattr(trainer, "fast_dev_run", False):
            return  # a run for debugging writes no files
        # ``log_dir`` broadcasts, so all ranks ask for it.
        dirname = trainer.log_dir if self.dirname is None else self.dirname
        if trainer.is_global_zero:
            figure = self.plot(rows, details)
            write_report(rows, Path(dirname or ".") / name, figure, **details)
            if self.verbose and trainer.state.fn != TrainerFn.FITTING:
                print_table(rows, name.replace("_", " "))
            for logger in trainer.loggers:
                # Told by the method and not by the class: Lightning's TensorBoardLogger has two names.
                add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
                if add_figure is not None:
                    add_figure(name, figure, trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
