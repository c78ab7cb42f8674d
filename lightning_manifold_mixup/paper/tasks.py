"""LightningModules for what is not classification: they know nothing of mixup, the callback does it all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassJaccardIndex
from typing_extensions import override

from lightning_manifold_mixup.modules.optimization import Interval, configured

if TYPE_CHECKING:  # it brings jsonargparse, which finds these here when it makes a command line
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

__all__ = ["RegressionModule", "SegmentationModule"]


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


class _Task(pl.LightningModule, ABC):
    """A network that is trained by a loss and judged by a metric.

    Args:
        model: the network.
        metric: is given predictions and targets in validation and in testing.
        optimizer: makes the optimizer from the parameters; Adam with learning rate 1e-3 by default.
        lr_scheduler: makes the learning rate scheduler from the optimizer; none by default.
        lr_interval: whether the scheduler is stepped each ``"epoch"`` or each ``"step"``.
    """

    metric_name: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        metric: Metric,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__()
        self.model = model
        self.metrics = nn.ModuleDict({stage: metric.clone() for stage in ("val", "test")})
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval

    @abstractmethod
    def loss(self, predictions: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss."""

    @override
    def configure_optimizers(self) -> Any:
        return configured(self.parameters(), self.optimizer, self.lr_scheduler, self.lr_interval)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._evaluate("val", batch))

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Log the metric, and return the loss."""
        x, y = batch
        predictions = self(x)
        self.metrics[stage](predictions, y)
        self.log(f"{stage}/{self.metric_name}", self.metrics[stage])  # type: ignore[arg-type]
        return self.loss(predictions, y)


class RegressionModule(_Task):
    """Trains a network to predict a number by the squared error; logs the root mean squared error, ``test/rmse``.

    Args:
        model: maps inputs to (n, 1).
        optimizer: makes the optimizer from the parameters; Adam with learning rate 1e-3 by default.
        lr_scheduler: makes the learning rate scheduler from the optimizer; none by default.
        lr_interval: whether the scheduler is stepped each ``"epoch"`` or each ``"step"``.

    Example:
        >>> module = RegressionModule(nn.Linear(4, 1))
        >>> module(torch.zeros(2, 4)).shape
        torch.Size([2])
    """

    metric_name = "rmse"

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__(model, MeanSquaredError(squared=False), optimizer, lr_scheduler, lr_interval)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Predictions, (n,)."""
        return self.model(x).squeeze(1)  # type: ignore[no-any-return]

    @override
    def loss(self, predictions: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(predictions, y)


class SegmentationModule(_Task):
    """Trains a network to label pixels by cross entropy; logs the intersection over union, ``test/iou``.

    Args:
        model: maps images to logits (n, num_classes, height, width).
        num_classes: number of classes, the background among them.
        optimizer: makes the optimizer from the parameters; Adam with learning rate 1e-3 by default.
        lr_scheduler: makes the learning rate scheduler from the optimizer; none by default.
        lr_interval: whether the scheduler is stepped each ``"epoch"`` or each ``"step"``.

    Example:
        >>> module = SegmentationModule(nn.Conv2d(3, 4, 1), num_classes=4)
        >>> module(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    metric_name = "iou"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__(model, MulticlassJaccardIndex(num_classes), optimizer, lr_scheduler, lr_interval)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, num_classes, height, width)."""
        return self.model(x)  # type: ignore[no-any-return]

    @override
    def loss(self, predictions: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(predictions, y)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test/nll", self._evaluate("test", batch))
