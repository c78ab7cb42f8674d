"""A complete classifier that brings Manifold Mixup along."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_type_hints
from weakref import WeakSet

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, Metric, MetricCollection, MinMetric
from torchmetrics.classification import MulticlassCalibrationError
from typing_extensions import TypedDict, override

from lightning_manifold_mixup._step.batch.keys import KeyOrKeys
from lightning_manifold_mixup._step.check.proof import Passes
from lightning_manifold_mixup._step.host import Module
from lightning_manifold_mixup._step.mix.drawing import Alpha, AlphaSchedule
from lightning_manifold_mixup.callback import ManifoldMixupCallback
from lightning_manifold_mixup.modules.losses import LossName, SoftLabelLossMixin
from lightning_manifold_mixup.modules.optimization import Interval, configured, paper_sgd
from lightning_manifold_mixup.partners import Partners

if TYPE_CHECKING:  # it brings jsonargparse, which finds these here when it makes a command line
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

Batch = tuple[Tensor, Tensor]

# Those that came with a module: a Trainer keeps them when it goes on to another module.
_BROUGHT: WeakSet[ManifoldMixupCallback] = WeakSet()
# load_from_checkpoint reads no other classes than torch's own and those that are known to be harmless.
torch.serialization.add_safe_globals([AlphaSchedule])


class MixupOptions(TypedDict, total=False):
    """What ``ManifoldMixupCallback`` takes beside ``alpha`` and ``layers``; it says what each is."""

    probability: float
    input_key: KeyOrKeys
    target_key: KeyOrKeys
    mask_key: KeyOrKeys
    target_modules: Sequence[str]
    partners: Partners | None
    dominant: bool
    clean_weight: float
    batch_dim: int | None
    self_check: bool
    passes: Passes
    seed: int | None
    log_mixing: bool
    log_clean: bool


# Instead of their names, which jsonargparse before 4.50 takes for types that it cannot check.
MixupOptions.__annotations__ = get_type_hints(MixupOptions)


class ManifoldMixupModule(SoftLabelLossMixin, Module):
    """Trains a classifier with Manifold Mixup, and evaluates it on plain data.

    Use it as it is, or subclass it. Batches are pairs of inputs and (n,) class indices. It brings a
    ``ManifoldMixupCallback`` along, made of ``alpha``, ``layers`` and ``mixup``. To use one of your own (with
    another ``draw``, for instance), give it to the Trainer and set ``alpha=0`` here.

    ``load_from_checkpoint(path, model=network)`` takes all arguments from the checkpoint but ``model``, ``optimizer``
    and ``lr_scheduler``: these hold code, which a checkpoint does not. Hand the last two as well to go on training. A
    checkpoint of a LightningCLI has them, too: it holds the configuration.

    Args:
        model: maps inputs to (n, num_classes) logits.
        num_classes: number of classes.
        alpha: see ``ManifoldMixupCallback``; 0 is the baseline without mixup, by the same code.
        layers: see ``ManifoldMixupCallback``. Names start with ``"model."``.
        mixup: the callback's other arguments, by name (``{"log_mixing": True}``).
        loss: ``"cross_entropy"``, or ``"bce"``: binary cross entropy of the softmax, as in the paper's public code.
        optimizer: makes the optimizer from the parameters; SGD as in the paper by default.
        lr_scheduler: makes the learning rate scheduler from the optimizer; none by default.
        lr_interval: whether the scheduler is stepped each ``"epoch"`` or each ``"step"``.

    Attributes:
        mixup: the callback. ``module.mixup.last_draw`` is the draw of the batch in progress.

    Raises:
        ValueError: for a wrong argument, at construction.
        MisconfigurationException: when a Trainer has a callback of its own beside this one.

    Example:
        >>> module = ManifoldMixupModule(nn.Linear(4, 3), num_classes=3, alpha=2.0, mixup={"log_mixing": True})
        >>> module(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
        >>> print(module.mixup)
        Manifold Mixup: alpha 2.0, S = auto, not yet chosen
    """

    # Not for ``to_torchscript``: metrics are no part of the network, and older ones cannot be compiled.
    __jit_ignored_attributes__ = ("best_error", "evaluations")

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        alpha: Alpha | AlphaSchedule = 2.0,
        layers: str | list[str] | dict[str, float] = "auto",
        mixup: MixupOptions | None = None,
        loss: LossName = "cross_entropy",
        optimizer: OptimizerCallable = paper_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__()
        if loss not in ("cross_entropy", "bce"):
            raise ValueError(f"Expected loss to be 'cross_entropy' or 'bce', got {loss!r}.")
        saved = {
            "num_classes": num_classes,
            "alpha": alpha,
            "layers": layers,
            "mixup": mixup,
            "loss": loss,
            "lr_interval": lr_interval,
        }
        self._save(saved)
        self.model = model
        self.num_classes = num_classes
        self.mixup = ManifoldMixupCallback(alpha=alpha, layers=layers, **check_options(mixup))
        self.soft_label_loss_name = loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.evaluations = nn.ModuleDict({stage: Evaluation(num_classes, f"{stage}/") for stage in ("val", "test")})
        self.best_error = MinMetric()

    def _save(self, hyperparameters: dict[str, Any], without: Sequence[str] = ()) -> None:
        """Save what ``load_from_checkpoint`` needs."""
        if self.save_configuration():  # of a LightningCLI, which knows how to make all of it again
            return
        # Lightning would compare them with the arguments of a subclass, which may be arrays.
        known = {*hyperparameters, *self.hparams}
        others = [name for name in inspect.signature(type(self)).parameters if name not in known]
        self.save_hyperparameters(hyperparameters, ignore=[*others, *without])

    _choice = (
        "Take the Trainer's out, and give its settings to the module (`alpha`, `layers`, `mixup`); or set `alpha=0` in "
        "the module, which leaves the mixing to the Trainer's."
    )

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        trainer: Any = self.trainer
        trainer.callbacks = [c for c in trainer.callbacks if c not in _BROUGHT or c is self.mixup]
        present = [c for c in trainer.callbacks if isinstance(c, ManifoldMixupCallback)]
        if self.mixup.alpha == 0 or self.mixup in present:
            return []
        if present:
            raise MisconfigurationException(
                f"Expected one ManifoldMixupCallback, got that of {type(self).__name__} ({self.mixup}) and one in the "
                f"Trainer ({present[0]}). {self._choice}"
            )
        _BROUGHT.add(self.mixup)
        return [self.mixup]

    @override
    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        known = getattr(data, "num_classes", None)
        if isinstance(known, int) and known > self.num_classes:
            raise ValueError(
                f"Expected num_classes of at least {known}, as {type(data).__name__} says, got {self.num_classes}."
            )

    @override
    def configure_optimizers(self) -> Any:
        return configured(self.parameters(), self.optimizer, self.lr_scheduler, self.lr_interval)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, num_classes)."""
        return self.model(x)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.supervised_loss(*batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def supervised_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of labelled samples, a scalar, and log their accuracy."""
        logits = self(x)
        if logits.shape[1] != self.num_classes:  # or the first evaluation would fail, after the training
            raise ValueError(
                f"Expected (n, {self.num_classes}) logits from the network, as num_classes says, got "
                f"{tuple(logits.shape)}."
            )
        accuracy = self.soft_label_accuracy(logits, y)
        self.log("train/accuracy", accuracy, on_step=False, on_epoch=True, batch_size=len(logits))
        return self.soft_label_loss(logits, y)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    @override
    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Class probabilities, (n, num_classes)."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        return self(x).softmax(1)  # type: ignore[no-any-return]

    @override
    def on_validation_epoch_end(self) -> None:
        values = self._log_evaluations("val")
        if not self.trainer.sanity_checking:
            self.log("val/error_best", self.best_error(values["val/error"]))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluations("test")

    def _networks(self) -> dict[str, nn.Module]:
        """Return the networks to evaluate, each with what follows the stage in the names of its metrics."""
        return {"": self}

    def _evaluate(self, stage: str, batch: Batch) -> None:
        x, y = batch
        for name, network in self._networks().items():
            self.evaluations[stage + name](network(x), y)

    def _log_evaluations(self, stage: str) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name in self._networks():
            values |= self.evaluations[stage + name].compute()  # type: ignore[operator]
        self.log_dict(values, prog_bar=stage == "val")
        return values


class Evaluation(nn.Module):
    """Errors in [0, 1], negative log likelihood in nats, and expected calibration error in [0, 1], over an epoch.

    Args:
        num_classes: number of classes; from six on there is a top-5 error, too.
        prefix: of the names, ``"val/"``.

    Example:
        >>> evaluation = Evaluation(num_classes=2, prefix="val/")
        >>> evaluation(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        >>> {name: round(value.item(), 2) for name, value in evaluation.compute().items()}
        {'val/error': 0.5, 'val/ece': 0.5, 'val/nll': 4.5}
    """

    def __init__(self, num_classes: int, prefix: str) -> None:
        super().__init__()
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": Accuracy(task="multiclass", num_classes=num_classes),
            "ece": MulticlassCalibrationError(num_classes),
        }
        if num_classes > 5:
            metrics["top5_accuracy"] = Accuracy(task="multiclass", num_classes=num_classes, top_k=5)
        self.metrics = MetricCollection(metrics, prefix=prefix)
        self.nll = MeanMetric()

    def forward(self, logits: Tensor, y: Tensor) -> None:
        """Add a batch: (n, classes) and (n,)."""
        logits = logits.float()
        self.metrics.update(logits.softmax(1), y)
        self.nll.update(F.cross_entropy(logits, y, reduction="none"))

    def compute(self) -> dict[str, Tensor]:
        """Return the values of the epoch, by name; the next one begins."""
        values = {
            name.replace("accuracy", "error"): 1 - value if name.endswith("accuracy") else value
            for name, value in self.metrics.compute().items()
        }
        values[f"{self.metrics.prefix}nll"] = self.nll.compute()
        self.metrics.reset()
        self.nll.reset()
        return values


def check_options(options: MixupOptions | None, own: Sequence[str] = ("alpha", "layers")) -> dict[str, Any]:
    """Check the callback's further arguments.

    Args:
        options: by name.
        own: names of arguments that are the module's own to give.

    Raises:
        ValueError: for one of those, and for a name that the callback does not know.
    """
    known = [name for name in MixupOptions.__annotations__ if name not in own]
    for name in options or {}:
        if name in own:
            raise ValueError(f"Expected no {name!r} in `mixup`: the module itself gives it to the callback.")
        if name not in known:
            raise ValueError(f"Expected options of the callback in `mixup` ({', '.join(known)}), got {name!r}.")
    return dict(options or {})
