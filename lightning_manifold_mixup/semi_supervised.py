"""Manifold Mixup from few labels and many unlabelled samples.

The loss of a step is ``labelled + w(t) * consistency``.

- *labelled* is supervised Manifold Mixup on a labelled batch (``mixing.py``).
- *consistency*: an unlabelled batch has no labels to mix, so the predictions of a *teacher* stand in for them. The
  student, with its hidden states mixed at layer k, is to predict the teacher's predictions for the plain samples,
  mixed with the same lam and permutation. No gradient goes into these.
- ``w(t) = w_max * exp(-5 (1 - t)^2)``, where t rises from 0 to 1 over the first part of training.

There are two published variants.

- ``teacher="self"`` (Verma et al., ICLR 2019 version): the student's own predictions, mean squared error
  between logits.
- ``teacher="ema"`` (Interpolation Consistency Training, arXiv 1903.03825, algorithm 1): the predictions of the
  exponential moving average of the student, mean squared error between ``softmax(student)`` and ``softmax(mixed
  teacher logits)``.

Batch normalisation is that of the published code of both: **every pass is in training mode**, the teacher's too. Each
pass normalises with the statistics of its own batch, and updates the running statistics of the network that it runs.
So those of the student have seen mixed and plain batches. An EMA teacher has its own, of plain unlabelled batches:
its parameters are averages of the student's, its buffers are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_manifold_mixup._step.batch import describe
from lightning_manifold_mixup._step.compiled import compiled_parts
from lightning_manifold_mixup._step.randomness import generator, global_seed
from lightning_manifold_mixup._step.targets import plain
from lightning_manifold_mixup.callback import ManifoldMixupCallback
from lightning_manifold_mixup.layers import INPUT, eligible_layers, named_layers, resolve_layers
from lightning_manifold_mixup.losses import LossName
from lightning_manifold_mixup.mixing import Mix, check_alpha, draw_mix, mixing
from lightning_manifold_mixup.module import Batch, ManifoldMixupModule, _default_optimizer

if TYPE_CHECKING:  # it brings jsonargparse, which finds these here when it makes a command line
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

_PUBLISHED = {"self": (1.0, 0.4), "ema": (100.0, 0.25)}  # w_max and ramp


def consistency_weight(step: int, ramp_steps: float, w_max: float) -> float:
    """``w_max * exp(-5 (1 - t)^2)`` with ``t = step / ramp_steps``, at most 1.

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


def consistency_loss(logits: Tensor, target_logits: Tensor, softmax: bool) -> Tensor:
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
        logits, target_logits = _wide(logits).softmax(1), _wide(target_logits).softmax(1)
    return F.mse_loss(_wide(logits), _wide(target_logits))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, step: int, decay: float = 0.999) -> None:
    """``teacher <- d * teacher + (1 - d) * student`` with ``d = min(1 - 1 / (step + 1), decay)``, for parameters.

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


class SemiSupervisedManifoldMixupModule(ManifoldMixupModule):
    """Trains a classifier from few labels and many unlabelled samples; see the module's docstring for the method.

    Training batches are ``{"labelled": (x, y), "unlabelled": (x, ...)}``, as
    :class:`~lightning_manifold_mixup.paper.data.SemiSupervisedDataModule` makes them. It draws and mixes by itself,
    without the callback: k, lam and permutation for the labelled and again for the unlabelled part, as functions of
    seed, rank and number of the batch alone; k is equal on all ranks. For the labelled part they are the draws of the
    callback.

    Evaluation logs ``val/error``, ``val/nll``, ... of the student, and ``val/teacher_error``, ... of an EMA teacher,
    which is what ICT reports; likewise for test. ``module(x)`` and predict are the student, ``module.teacher(x)`` is
    the teacher.

    Args:
        model: maps inputs to (n, num_classes) logits.
        num_classes: number of classes.
        teacher: ``"self"``, the network itself, or ``"ema"``, its exponential moving average. The average starts as a
            copy of the network when training starts, is updated after each optimizer step, and is saved in
            checkpoints.
        w_max: final weight of the consistency loss. None is the published one for CIFAR-10: 1 for ``"self"`` (2 for
            SVHN), 100 for ``"ema"``. 0 leaves the unlabelled samples out: supervised Manifold Mixup, bit for bit, no
            teacher.
        ramp: share of training after which the weight is w_max. None is the published one: 0.4 for ``"self"``, 0.25 for
            ``"ema"``.
        alpha_labelled: parameter of Beta(alpha, alpha) for labelled batches.
        alpha_unlabelled: the same for unlabelled batches. ICLR 2019 has 0.1 and 2; ICT has 1 and 1 (SVHN: 0.1 and 0.1).
        ema_decay: of an EMA teacher, in the long run; see :func:`update_teacher`.
        layers: see :class:`ManifoldMixupModule`; ``"auto"`` asks ``eligible_layers`` about the first labelled batch.
        loss: of labelled batches; see :class:`ManifoldMixupModule`.
        seed: of the draws; None follows ``seed_everything``.
        optimizer: see :class:`ManifoldMixupModule`.
        lr_scheduler: likewise.
        lr_interval: likewise.

    Raises:
        ValueError: for a wrong argument, at construction; for layers or parts of the batch that are not there, in fit.
        MisconfigurationException: in fit, for a layer that a skip connection bypasses, a ManifoldMixupCallback beside
            this module, or a training without an end.

    Example:
        >>> module = SemiSupervisedManifoldMixupModule(nn.Linear(4, 3), num_classes=3, teacher="ema", w_max=10.0)
        >>> module(torch.zeros(2, 4)).shape, module.teacher(torch.zeros(2, 4)).shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        teacher: Literal["self", "ema"] = "ema",
        w_max: float | None = None,
        ramp: float | None = None,
        alpha_labelled: float = 1.0,
        alpha_unlabelled: float = 1.0,
        ema_decay: float = 0.999,
        layers: str | list[str] = "auto",
        loss: LossName = "cross_entropy",
        seed: int | None = None,
        optimizer: OptimizerCallable = _default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(model, num_classes, alpha_labelled, layers, loss, optimizer, lr_scheduler, lr_interval)
        if teacher not in _PUBLISHED:
            raise ValueError(f"Expected teacher to be 'self' or 'ema', got {teacher!r}.")
        published_w_max, published_ramp = _PUBLISHED[teacher]
        self.w_max = published_w_max if w_max is None else w_max
        self.ramp = published_ramp if ramp is None else ramp
        if not (math.isfinite(self.w_max) and self.w_max >= 0):
            raise ValueError(f"Expected w_max to be a finite number >= 0, got {w_max}.")
        for name, share in (("ramp", self.ramp), ("ema_decay", ema_decay)):
            if not 0 <= share <= 1:
                raise ValueError(f"Expected {name} in [0, 1], got {share}.")
        check_alpha(alpha_labelled)
        check_alpha(alpha_unlabelled)
        self.alpha_labelled = alpha_labelled
        self.alpha_unlabelled = alpha_unlabelled
        self.ema_decay = ema_decay
        self.seed = seed
        self.teacher = deepcopy(model).requires_grad_(False) if teacher == "ema" and self.w_max else None
        if self.teacher is not None:
            self.val_teacher_metrics = self.val_metrics.clone(prefix="val/teacher_")
            self.test_teacher_metrics = self.test_metrics.clone(prefix="test/teacher_")
            self.val_teacher_nll, self.test_teacher_nll = MeanMetric(), MeanMetric()
        self._drawing_seed = seed
        self._eligible: list[nn.Module | None] = []  # S, settled on the first batch; None is the input
        self._ramp_steps = 0.0

    # --------------------------------------------------------------------------------------------------------- one step

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        x, y, u = self._parts(batch)
        if not self._eligible:
            self._settle_layers(x)
        shared, own = self._generators()

        logits, mix = self._mixed_forward(x, self.alpha_labelled, shared, own)
        target = mix.target(y)
        loss: Tensor = plain(self.soft_label_loss(logits, target))
        values = {"train/labelled_loss": loss.detach()}
        if u is not None:
            with torch.no_grad():
                predictions = _wide(self(u) if self.teacher is None else self.teacher(u))
            mixed_logits, mix = self._mixed_forward(u, self.alpha_unlabelled, shared, own)
            consistency = consistency_loss(mixed_logits, mix(predictions), softmax=self.teacher is not None)
            weight = consistency_weight(self.trainer.global_step, self._ramp_steps, self.w_max)
            loss = loss + weight * consistency
            values |= {"train/consistency_loss": consistency.detach(), "train/consistency_weight": torch.tensor(weight)}

        self.log_dict(values, batch_size=len(x))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        accuracy = self.soft_label_accuracy(logits, target)
        self.log("train/accuracy", accuracy, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def _mixed_forward(
        self, x: Tensor, alpha: float, shared: np.random.Generator, own: np.random.Generator
    ) -> tuple[Tensor, Mix]:
        """Logits with the states mixed at a layer k drawn from S, and how they were mixed."""
        layer = self._eligible[shared.integers(len(self._eligible))]
        mix = draw_mix(len(x), alpha, own).to(x.device)
        if layer is None:
            return self(mix(x)), mix
        with mixing(layer, mix):
            return self(x), mix

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            update_teacher(self.teacher, self.model, self.trainer.global_step + 1, self.ema_decay)

    def _parts(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labelled inputs, their labels, and unlabelled inputs if these are used."""
        parts = batch if isinstance(batch, Mapping) else {}
        labelled: Any = parts.get("labelled")
        u: Any = parts.get("unlabelled") if self.w_max else None
        u = u[0] if isinstance(u, (tuple, list)) and u else u
        is_pair = isinstance(labelled, (tuple, list)) and len(labelled) == 2
        if not is_pair or (self.w_max and not isinstance(u, Tensor)):
            raise ValueError(
                'Expected training batches {"labelled": (x, y), "unlabelled": (x, ...)}, as SemiSupervisedDataModule '
                'or a CombinedLoader of two loaders in mode "max_size_cycle" makes them. The batch is:\n'
                f"{describe(batch)}"
            )
        x, y = labelled
        return x, y, u

    def _generators(self) -> tuple[np.random.Generator, np.random.Generator]:
        """Of the draws that all ranks share (k), and of this rank's own (lam and partners), for this batch."""
        count = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        shared = generator(self._drawing_seed, count, stream=0)
        shared.random()  # where the callback draws whether to mix: from here on its draws and ours are the same
        return shared, generator(self._drawing_seed, count, stream=1 + self.global_rank)

    # ------------------------------------------------------------------------------------------------- before the steps

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        if any(isinstance(c, ManifoldMixupCallback) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{type(self).__name__} draws and mixes by itself: take the ManifoldMixupCallback out of the Trainer."
            )
        return []

    @override
    def on_fit_start(self) -> None:
        if self._drawing_seed is None:
            self._drawing_seed = self.trainer.strategy.broadcast(global_seed())

    @override
    def on_train_start(self) -> None:
        self._eligible = []
        total = self.trainer.estimated_stepping_batches
        if self.w_max and not 0 < total < math.inf:
            raise MisconfigurationException(
                "The consistency weight rises over a share of training, so the Trainer must know when that ends: set "
                f"max_epochs or max_steps (estimated number of steps: {total})."
            )
        self._ramp_steps = self.ramp * total
        if self.teacher is None:
            return
        narrow = {str(p.dtype) for p in self.model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        if narrow:
            raise MisconfigurationException(
                f"Expected weights of float32 or wider for an EMA teacher, got {', '.join(narrow)}: what a step adds "
                'to the average would be rounded away. Use precision="bf16-mixed" or "16-mixed".'
            )
        if self.trainer.global_step == 0:  # weights may have been loaded since construction
            self.teacher.load_state_dict(self.model.state_dict())

    def _settle_layers(self, x: Tensor) -> None:
        """Chooses S, or checks it, on the first labelled batch."""
        # in backward, where a layer would not know which of two mixes is meant
        recomputed: set[nn.Module | None] = set()

        def note(layer: nn.Module, args: Any, output: Any) -> None:
            if not torch.is_grad_enabled():
                recomputed.add(layer)

        modules = named_layers(self)
        with ExitStack() as stack:
            for module in modules.values():
                stack.callback(module.register_forward_hook(note).remove)
            report = eligible_layers(self, x)
        if self.layers == "auto":
            names = self.trainer.strategy.broadcast(report.default)
        else:
            names = resolve_layers(self, [self.layers] if isinstance(self.layers, str) else self.layers)
        refusals = [refusal for name in names if (refusal := report.refusal(name))]
        self._eligible = [None if name == INPUT else modules[name] for name in names]
        if any(layer in recomputed for layer in self._eligible):
            refusals.append("Layers inside an activation checkpoint cannot be mixed here, only those around it.")
        if names != [INPUT] and compiled_parts(self):
            refusals.append(
                "Hidden states of a network that torch.compile has wrapped cannot be mixed here, only inputs."
            )
        if refusals or not names:
            raise MisconfigurationException(
                "\n".join(refusals) or "Found no layer where the whole state could be mixed."
            )
        rank_zero_info(f"Manifold Mixup: each batch is mixed at one of {', '.join(names)}.")

    # ------------------------------------------------------------------------------------------------------- evaluation

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.teacher is not None:
            self._evaluate(batch, self.val_teacher_metrics, self.val_teacher_nll, self.teacher)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if self.teacher is not None:
            self._evaluate(batch, self.test_teacher_metrics, self.test_teacher_nll, self.teacher)

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.teacher is not None:
            self._log_evaluation("val", self.val_teacher_metrics, self.val_teacher_nll)

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self.teacher is not None:
            self._log_evaluation("test", self.test_teacher_metrics, self.test_teacher_nll)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["manifold_mixup_seed"] = self._drawing_seed

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.seed is None:
            self._drawing_seed = checkpoint.get("manifold_mixup_seed")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
