"""LightningModules for what is not classification: they know nothing of mixup, the callback does it all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassJaccardIndex
from typing_extensions import override

if TYPE_CHECKING:  # it brings jsonargparse, which finds these here when it makes a command line
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

__all__ = ["RegressionModule", "SegmentationModule"]


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


class _Task(pl.LightningModule):
    """A network, its optimizer and its schedule."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": self.lr_interval}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


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

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler, lr_interval)
        self.val_rmse, self.test_rmse = MeanSquaredError(squared=False), MeanSquaredError(squared=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Predictions, (n,)."""
        return self.model(x).squeeze(1)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        predictions = self(x)
        self.val_rmse(predictions, y)
        self.log("val/rmse", self.val_rmse)
        self.log("val/loss", F.mse_loss(predictions, y))

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.test_rmse(self(x), y)
        self.log("test/rmse", self.test_rmse)


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

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler, lr_interval)
        self.val_iou, self.test_iou = MulticlassJaccardIndex(num_classes), MulticlassJaccardIndex(num_classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, num_classes, height, width)."""
        return self.model(x)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_iou(logits, y)
        self.log("val/iou", self.val_iou)
        self.log("val/loss", F.cross_entropy(logits, y))

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.test_iou(logits, y)
        self.log("test/iou", self.test_iou)
        self.log("test/nll", F.cross_entropy(logits, y))
