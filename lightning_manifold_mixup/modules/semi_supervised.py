"""Manifold Mixup from few labels and many unlabelled samples.

The loss of a step is ``labelled + w(t) * consistency``.

- *labelled* is supervised Manifold Mixup on a labelled batch (``mixing.py``).
- *consistency*: the predictions of a *teacher* stand in for the labels of an unlabelled batch. The student, with its
  hidden states mixed at layer k, learns to predict the teacher's predictions for the plain samples, mixed with the
  same lam and permutation. These targets carry no gradient.
- ``w(t) = w_max * exp(-5 (1 - t)^2)``, where t rises from 0 to 1 over the first part of training.

There are two published variants.

- ``teacher="self"`` (Verma et al., ICLR 2019 version): the student's own predictions, mean squared error of logits.
- ``teacher="ema"`` (Interpolation Consistency Training, arXiv 1903.03825, algorithm 1): those of the exponential moving
  average of the student, mean squared error between ``softmax(student)`` and ``softmax(mixed teacher logits)``.

As in the published code of both, **every pass is in training mode**, the teacher's too: batch normalisation takes the
statistics of the batch, and updates those of the network that runs. So those of the student come from mixed and plain
batches. An EMA teacher has its own, of plain unlabelled batches: its parameters are averages, its buffers are not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_manifold_mixup._step.batch.tree import describe
from lightning_manifold_mixup._step.host import is_overridden
from lightning_manifold_mixup._step.mix.drawing import DrawContext
from lightning_manifold_mixup.callback import ManifoldMixupCallback
from lightning_manifold_mixup.mixing import Draw, Mix, check_alpha
from lightning_manifold_mixup.modules.classification import Evaluation, ManifoldMixupModule, MixupOptions, check_options
from lightning_manifold_mixup.modules.consistency import consistency_loss, consistency_weight, update_teacher, wide
from lightning_manifold_mixup.modules.losses import LossName
from lightning_manifold_mixup.modules.optimization import Interval, paper_sgd

if TYPE_CHECKING:  # it brings jsonargparse, which finds these here when it makes a command line
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

_PUBLISHED = {"self": {"w_max": 1.0, "ramp": 0.4}, "ema": {"w_max": 100.0, "ramp": 0.25}}
_SAVED = ("teacher", "w_max", "ramp", "alpha_labelled", "alpha_unlabelled", "ema_decay", "mixup")


class PartsCallback(ManifoldMixupCallback):
    """Mixes the labelled and the unlabelled part of a batch, each with a lam of its own, both at one layer k.

    The loss is a sum of one term for each part, so its mean over k is that of two layers drawn apart.

    Args:
        alphas: of Beta(alpha, alpha), by part.
        **options: see ``ManifoldMixupCallback``.
    """

    def __init__(self, alphas: Mapping[str, float], **options: Any) -> None:
        super().__init__(
            alpha=alphas["labelled"] or alphas.get("unlabelled", 0.0),  # 0 would switch off both
            input_key=[f"{part}.0" for part in alphas],
            target_key=[f"{part}.1" for part in alphas],
            **options,
        )
        self.alphas = alphas

    @override
    def draw(self, context: DrawContext) -> Draw:
        return replace(context, alpha=self.alphas["labelled"]).draw()

    @override
    def draw_group(self, context: DrawContext, first: Draw) -> Mix:
        return replace(context, alpha=self.alphas["unlabelled"]).draw_mix()


class SemiSupervisedManifoldMixupModule(ManifoldMixupModule):
    """Trains a classifier from few labels and many unlabelled samples; see the module's docstring for the method.

    Training batches are ``{"labelled": (x, y), "unlabelled": (x, ...)}``, as ``SemiSupervisedDataModule`` makes them.
    When a batch arrives, the teacher predicts its unlabelled part (``on_after_batch_transfer``); these predictions are
    a target like the labels, and the callback that comes with the module mixes and checks both.

    Evaluation logs ``val/error``, ``val/nll``, ... of the student, and ``val/teacher_error``, ... of an EMA teacher,
    which is what ICT reports; likewise for test. ``module(x)`` is the student, ``module.teacher(x)`` the teacher.

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
        ema_decay: of an EMA teacher, in the long run; see ``update_teacher``.
        layers: see ``ManifoldMixupModule``.
        mixup: see ``ManifoldMixupModule``; without the keys of the batch, which are known.
        loss: of labelled batches; see ``ManifoldMixupModule``.
        optimizer: see ``ManifoldMixupModule``.
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
        layers: str | list[str] | dict[str, float] = "auto",
        mixup: MixupOptions | None = None,
        loss: LossName = "cross_entropy",
        optimizer: OptimizerCallable = paper_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        given = dict(locals())
        super().__init__(model, num_classes, 0.0, layers, None, loss, optimizer, lr_scheduler, lr_interval)
        if teacher not in _PUBLISHED:
            raise ValueError(f"Expected teacher to be 'self' or 'ema', got {teacher!r}.")
        for name, published in _PUBLISHED[teacher].items():
            given[name] = published if given[name] is None else given[name]
        self.w_max, self.ramp, self.ema_decay = given["w_max"], given["ramp"], ema_decay
        if not (math.isfinite(self.w_max) and self.w_max >= 0):
            raise ValueError(f"Expected w_max to be a finite number >= 0, got {w_max}.")
        for name in ("ramp", "ema_decay"):
            if not 0 <= given[name] <= 1:
                raise ValueError(f"Expected {name} in [0, 1], got {given[name]}.")
        check_alpha(alpha_labelled)
        check_alpha(alpha_unlabelled)
        alphas = {"labelled": alpha_labelled} | ({"unlabelled": alpha_unlabelled} if self.w_max else {})
        options = check_options(mixup, own=("alpha", "layers", "input_key", "target_key"))
        self.mixup = PartsCallback(alphas, layers=layers, **options)
        self._save({name: given[name] for name in _SAVED}, without=["alpha"])
        self.teacher = deepcopy(model).requires_grad_(False) if teacher == "ema" and self.w_max else None
        if self.teacher is not None:
            for stage in ("val", "test"):
                self.evaluations[f"{stage}_teacher"] = Evaluation(num_classes, f"{stage}/teacher_")
        self._ramp_steps = 0.0

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch that ``training_step`` is handed, with the teacher's predictions."""
        if self._trainer is None or not self.trainer.training:  # without one, TorchScript asks for it, too
            return batch
        match batch:
            case {"labelled": [x, y]} if not self.w_max:
                return {"labelled": (x, y)}
            case {"labelled": [x, y], "unlabelled": (Tensor() as u) | [Tensor() as u, *_]}:
                teacher = self if self.teacher is None else self.teacher
                with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
                    return {"labelled": (x, y), "unlabelled": (u, wide(teacher(u)))}
        raise ValueError(
            'Expected training batches {"labelled": (x, y), "unlabelled": (x, ...)}, as SemiSupervisedDataModule or a '
            f'CombinedLoader of two loaders in mode "max_size_cycle" makes them. The batch is:\n{describe(batch)}'
        )

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        loss = self.supervised_loss(*batch["labelled"])
        values = {"train/labelled_loss": loss.detach()}
        if "unlabelled" in batch:
            u, predictions = batch["unlabelled"]
            consistency = consistency_loss(self(u), predictions, softmax=self.teacher is not None)
            weight = consistency_weight(self.trainer.global_step, self._ramp_steps, self.w_max)
            loss = loss + weight * consistency
            values |= {"train/consistency_loss": consistency.detach(), "train/consistency_weight": torch.tensor(weight)}
        self.log_dict(values)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            update_teacher(self.teacher, self.model, self.trainer.global_step + 1, self.ema_decay)

    _choice = "Take the Trainer's out: this module's own mixes both parts of a batch. Its settings are the module's."

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and data is not None and is_overridden("on_after_batch_transfer", data):
            raise MisconfigurationException(
                f"Expected a data module without `on_after_batch_transfer`, got {type(data).__name__}: Lightning calls "
                "its method in place of this module's, where the teacher predicts. Do that work in "
                "`transfer_batch_to_device`."
            )
        # Lightning warns that it calls this module's method and not the data module's, which is intended.
        warnings.filterwarnings("ignore", "You have overridden `on_after_batch_transfer` in `LightningModule`")

    @override
    def on_train_start(self) -> None:
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

    @override
    def _networks(self) -> dict[str, nn.Module]:
        return {"": self} if self.teacher is None else {"": self, "_teacher": self.teacher}
