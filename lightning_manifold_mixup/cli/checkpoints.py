"""The checkpoints of ``fit``: the last and the best one, where they are, and how to go on from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

__all__ = ["JUDGED_BY", "NAMES", "Checkpoints", "new_folder", "newest"]

JUDGED_BY = ("val/error", "val/loss", "val_loss")
"""Metrics of the validation that tell which epoch is the best: the first that there is; the lower, the better."""

NAMES = ("last", "best")
_FOLDER = "checkpoints"


def new_folder(runs: Path) -> Path:
    """Make the folder of a new run below that of all runs of its name: ``version_0``, ``version_1``, and so on.

    Processes other than the first of a distributed run make none: they are told which it is in ``setup``.
    """
    versions = [int(path.name.removeprefix("version_")) for path in runs.glob("version_*") if path.name[8:].isdigit()]
    number = max(versions, default=-1) + 1
    while rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            (runs / f"version_{number}").mkdir(parents=True)
            break
        except FileExistsError:  # another run has just begun
            number += 1
    return runs / f"version_{number}"


def newest(runs: Path, name: str) -> Path | None:
    """Find the checkpoint ``"last"`` or ``"best"`` of the newest run that has one; None if there is none."""
    found = runs.glob(f"version_*/{_FOLDER}/{name}.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


class Checkpoints(Checkpoint):
    """Saves ``last.ckpt`` after each epoch, and ``best.ckpt`` after each validation that was the best so far.

    Args:
        folder: of the run; the files lie in ``checkpoints`` below it.
        command: what the user has typed after ``manifold-mixup``, for the message after Ctrl-C.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder = folder / _FOLDER
        self.command = command
        self.last: str | None = None
        self.last_epoch = -1
        self.best: str | None = None
        self.metric = ""
        self.value = float("inf")
        self.best_epoch = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        known = [name for name in JUDGED_BY if name in trainer.callback_metrics]
        if known and (value := float(trainer.callback_metrics[known[0]])) < self.value:
            self.metric, self.value, self.best_epoch = known[0], value, trainer.current_epoch
            self.best = str(self.folder / "best.ckpt")
            trainer.save_checkpoint(self.best, weights_only=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.last, self.last_epoch = str(self.folder / "last.ckpt"), trainer.current_epoch
            trainer.save_checkpoint(self.last, weights_only=False)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._say_how_to_go_on()

    @rank_zero_only
    def _say_how_to_go_on(self) -> None:
        if self.last is None:
            print("\nStopped before the end of the first epoch: nothing was saved.")
        else:
            print(f"\nStopped. Saved after epoch {self.last_epoch}: {_shown(self.last)}\nGo on: {self.command}")

    def __str__(self) -> str:
        if self.last is None:
            return "Nothing was saved."
        best = f", the best {_shown(self.best)} ({self.metric} {self.value:.4g}, epoch {self.best_epoch})"
        return f"Saved: the last weights {_shown(self.last)}" + ("" if self.best is None else best)

    @override
    def state_dict(self) -> dict[str, Any]:
        names = ("last", "last_epoch", "best", "metric", "value", "best_epoch")
        return {name: getattr(self, name) for name in names}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def _shown(path: str | None) -> str:
    """Return a path below the current folder as one that is relative to it."""
    return os.path.relpath(path) if path is not None and Path(path).is_relative_to(Path.cwd()) else str(path)
