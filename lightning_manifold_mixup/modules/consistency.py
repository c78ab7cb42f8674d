"""The terms of semi-supervised training: how much consistency counts, what it is, and the teacher's average."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def consistency_weight(step: int, ramp_steps: float, w_max: float) -> float:
    """Compute ``w_max * exp(-5 (1 - t)^2)`` with ``t = step / ramp_steps``, at most 1.

    Args:
        step: optimizer steps taken so far.
        ramp_steps: after how many of them the weight is ``w_max``; 0 for at once.
        w_max: the final weight.

    Example:
        >>> [round(consistency_weight(step, ramp_steps=100, w_max=10.0), 3) for step in (0, 50, 100, 150)]
        [0.067, 2.865, 10.0, 10.0]
    """
    t = min(step / ramp_steps, 1.0) if ramp_steps else 1.0
    return w_max * math.exp(-5 * (1 - t) ** 2)


def consistency_loss(logits: Tensor, target_logits: Tensor, *, softmax: bool) -> Tensor:
    """Mean squared error over samples and classes, in at least float32.

    Args:
        logits: (n, classes), of the student on mixed states.
        target_logits: (n, classes), the mixed logits of the teacher.
        softmax: compare probabilities (ICT), not logits (ICLR 2019).

    Returns:
        A scalar.

    Example:
        >>> consistency_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), softmax=False)
        tensor(2.)
    """
    if softmax:
        logits, target_logits = wide(logits).softmax(1), wide(target_logits).softmax(1)
    return F.mse_loss(wide(logits), wide(target_logits))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, decay: float = 0.999) -> None:
    """Average parameters: ``teacher <- d * teacher + (1 - d) * student``, ``d = min(1 - 1 / (step + 1), decay)``.

    For the first ``1 / (1 - decay)`` steps that is the plain average of all weights so far, with the initial ones.
    Buffers stay the teacher's own.

    Args:
        teacher: a copy of the student, changed in place.
        student: the network that is trained.
        step: optimizer steps taken so far, this one included; at least 1.
        decay: d in the long run.

    Example:
        >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(teacher.weight, 0.0), nn.init.constant_(student.weight, 3.0)
        >>> update_teacher(teacher, student, step=1)
        >>> update_teacher(teacher, student, step=2)
        >>> teacher.weight.item()
        2.0
    """
    average = get_ema_multi_avg_fn(min(1 - 1 / (step + 1), decay))  # type: ignore[no-untyped-call]
    average(list(teacher.parameters()), list(student.parameters()), None)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in what is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
