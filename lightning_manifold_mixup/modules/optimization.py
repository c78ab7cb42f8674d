"""Optimizer and schedule of a LightningModule that is handed the functions that make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

Interval = Literal["epoch", "step"]


def paper_sgd(parameters: Any) -> torch.optim.Optimizer:
    """Make the paper's optimizer: SGD with learning rate 0.1, Nesterov momentum 0.9 and weight decay 1e-4."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def configured(
    parameters: Iterable[nn.Parameter],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None,
    lr_interval: Interval,
) -> Any:
    """Return what ``configure_optimizers`` returns.

    Args:
        parameters: of the module.
        optimizer: makes the optimizer from them.
        lr_scheduler: makes the learning rate scheduler from the optimizer; None for none.
        lr_interval: whether the scheduler is stepped each ``"epoch"`` or each ``"step"``.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> type(configured(layer.parameters(), paper_sgd, None, "epoch")).__name__
        'SGD'
    """
    made = optimizer(parameters)
    if lr_scheduler is None:
        return made
    return {"optimizer": made, "lr_scheduler": {"scheduler": lr_scheduler(made), "interval": lr_interval}}
