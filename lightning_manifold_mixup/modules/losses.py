"""Losses that take hard, mixed and soft labels alike, and the mixin that brings them to any LightningModule."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_manifold_mixup._step.labels.mixed_loss import mixed_loss

LossName = Literal["cross_entropy", "bce"]


def softmax_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of the paper's public code: binary cross entropy of the softmax, mean over batch and classes.

    Args:
        logits: (n, classes), any floating point dtype; computed in at least float32, also under autocast.
        target: (n,) class indices, a ``MixedTarget``, or (n, classes) probabilities.

    Returns:
        A scalar.

    Example:
        >>> softmax_bce(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    with torch.autocast(logits.device.type, enabled=False):
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
        if not target.is_floating_point():
            target = F.one_hot(target, logits.shape[1])
        return F.binary_cross_entropy(probabilities, target.to(probabilities.dtype))


def label_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the share of correct predictions: lam-weighted for mixed labels, expected for probabilities.

    Args:
        logits: (n, classes).
        target: (n,) class indices, a ``MixedTarget``, or (n, classes) probabilities.

    Returns:
        A scalar without gradient, ``lam * accuracy(y) + (1 - lam) * accuracy(y[partners])`` for mixed labels.

    Example:
        >>> from lightning_manifold_mixup import MixedTarget
        >>> y = MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor(0.75))
        >>> label_accuracy(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), y)
        tensor(0.5000)
    """
    predictions = logits.detach().argmax(1)
    if target.is_floating_point():
        return target.gather(1, predictions[:, None]).mean()
    accuracy: Tensor = mixed_loss(lambda labels: (predictions == labels).float().mean(), target)
    return accuracy


class SoftLabelLossMixin:
    """Gives a LightningModule a loss and a training accuracy for hard, mixed and soft labels.

    Attributes:
        soft_label_loss_name: ``"cross_entropy"``, or ``"bce"`` for the loss of the paper's public code
            (``softmax_bce``).

    Example:
        >>> import lightning as L
        >>> class Classifier(SoftLabelLossMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Linear(2, 3)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         logits = self.model(x)
        ...         self.log("train/accuracy", self.soft_label_accuracy(logits, y))
        ...         return self.soft_label_loss(logits, y)
        >>> probabilities = torch.tensor([[0.2, 0.8, 0.0]])
        >>> Classifier().soft_label_loss(torch.zeros(1, 3), probabilities)
        tensor(1.0986)
    """

    soft_label_loss_name = "cross_entropy"  # a `LossName`; TorchScript refuses a class that says so

    def soft_label_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss; see ``label_accuracy`` for the targets that it takes."""
        if self.soft_label_loss_name == "bce":
            return softmax_bce(logits, target)
        return F.cross_entropy(logits, target)

    def soft_label_accuracy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute ``label_accuracy``."""
        return label_accuracy(logits, target)
