"""One training of a recipe with one method and one seed, and its result."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_manifold_mixup.cli.checkpoints import JUDGED_BY
from lightning_manifold_mixup.cli.methods import CLEAN, LABELS, label_of, set_method
from lightning_manifold_mixup.cli.terminal import UsageError
from lightning_manifold_mixup.cli.training import Prepared, missing_for_test
from lightning_manifold_mixup.paper import recipes

__all__ = ["BEST", "LAST", "History", "Result", "Run", "train", "version", "write"]

LAST, BEST = "last epoch", "best val epoch"

_WITHOUT_EFFECT = (
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
)
"""Options of the Trainer that do not change the results."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training of one method with one seed.

    Args:
        recipe: name or file, as ``recipes.layers_of`` takes it.
        method: one of ``LABELS``.
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
        return label_of(self.recipe)

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.label}, {LABELS[self.method]}, seed {self.seed}"

    def prepare(self) -> Prepared:
        """Parse the recipe, and set method and seed."""
        name = self.recipe
        if recipes.is_row(name):  # the paper's rows have a file for each method
            name = recipes.with_method(name, self.method.removesuffix(CLEAN))
        overrides = [option.replace("{seed}", str(self.seed)) for option in self.overrides]
        cli = Prepared(["--config", name, *overrides], run=False)
        if not recipes.is_row(name) or self.method.endswith(CLEAN):
            set_method(cli.config, self.method)
        cli.config.seed_everything = self.seed
        cli.config.trainer.logger = False
        return cli

    def key(self, cli: Prepared) -> str:
        """Hash all that the results depend on (the configuration and the version of this package) to eight letters."""
        config = yaml.safe_load(cli.parser.dump(cli.config))
        for name in _WITHOUT_EFFECT:
            config["trainer"].pop(name, None)
        text = json.dumps([version(), config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def folder(self, key: str) -> Path:
        """Return the folder of the run's files."""
        return self.out / "runs" / f"{self.label}-{self.method}-seed{self.seed}-{key}"


def train(cli: Prepared, folder: Path) -> Result:
    """Train and test a configuration.

    Args:
        cli: the configuration.
        folder: for its logs, its configuration (``config.yaml``) and the trained weights (``last.ckpt``).

    Returns:
        Test metrics after the last epoch and, if the validation logs an error or a loss, after the epoch in which that
        was lowest; the validation metrics of each epoch; the seconds of training, and of everything together.
    """
    started = time.perf_counter()
    _clear(folder)
    trainer_config = cli.config.trainer
    trainer_config.default_root_dir = str(folder)
    trainer_config.enable_progress_bar = sys.stdout.isatty()
    trainer_config.enable_model_summary = False
    cli.save_config_callback = None
    cli.make()
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    trainer.logger = CSVLogger(folder, name="log", version="", flush_logs_every_n_steps=1000)
    history = History()
    trainer.callbacks += [Testable(), history]  # type: ignore[attr-defined]
    write(folder / "config.yaml", cli.parser.dump(cli.config))

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


class Testable(Callback):
    """Refuses to train what cannot be tested after it.

    Raises:
        UsageError: when training begins, without a test set or a ``test_step``.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if missing := missing_for_test(pl_module, trainer.datamodule):  # type: ignore[attr-defined]
            raise UsageError(f"Expected a test set and a `test_step`, whose results are compared: {missing}.")


class History(Callback):
    """Keeps the validation metrics of every epoch, and the weights of the best one.

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
        value = next((metrics[k] for k in JUDGED_BY if k in metrics), None)
        if value is not None and value < self._lowest:
            self._lowest, self.best_epoch = value, trainer.current_epoch
            self.best_state = deepcopy(pl_module.state_dict())


def _test(trainer: Trainer, model: LightningModule, data: Any) -> dict[str, float]:
    trainer.test(model, datamodule=data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@rank_zero_only
def write(file: Path, text: str) -> None:
    """Write a file in one step, so that an interrupted run leaves no incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


@rank_zero_only
def _clear(folder: Path) -> None:
    """Remove the files of an interrupted run."""
    shutil.rmtree(folder, ignore_errors=True)


def version() -> str:
    """Return the version of this package."""
    from lightning_manifold_mixup import __version__

    return __version__
