"""Manifold Mixup as a Lightning callback: draw, arm, check, disarm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from typing_extensions import override

from lightning_manifold_mixup._step import batch as batches
from lightning_manifold_mixup._step.compiled import compiled_parts, fresh_graphs
from lightning_manifold_mixup._step.criteria import CriterionHooks, criterion_candidates, hand_plain_labels, metrics_of
from lightning_manifold_mixup._step.host import Callback
from lightning_manifold_mixup._step.leaks import Leaks
from lightning_manifold_mixup._step.randomness import generator, global_seed
from lightning_manifold_mixup._step.step import Keys, MixedStep, sample_of
from lightning_manifold_mixup._step.targets import labellings
from lightning_manifold_mixup.layers import INPUT, LayerReport, named_layers, observe, resolve_layers
from lightning_manifold_mixup.mixing import Mix, MixingHook, check_alpha, draw_mix


@dataclass(frozen=True)
class AlphaSchedule:
    """An alpha that moves linearly from ``start`` to ``end`` over the first ``epochs`` epochs, and stays there.

    Args:
        start: alpha of the first epoch, >= 0; while it is 0, nothing is mixed.
        end: alpha from epoch ``epochs`` on, >= 0.
        epochs: length of the ramp, in epochs, >= 1.

    Example:
        >>> schedule = AlphaSchedule(start=0.0, end=2.0, epochs=4)
        >>> [schedule(epoch) for epoch in range(6)]
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    """

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        check_alpha(self.start)
        check_alpha(self.end)
        if self.epochs < 1:
            raise ValueError(f"Expected a schedule of at least one epoch, got epochs={self.epochs}.")

    def __call__(self, epoch: int) -> float:
        """Alpha in an epoch, counted from 0."""
        return self.start + (self.end - self.start) * min(epoch / self.epochs, 1.0)


class ManifoldMixupCallback(Callback):
    """Trains any LightningModule with Manifold Mixup (Verma et al., ICML 2019, section 2).

    For each training batch it draws a layer k from S, lam ~ Beta(alpha, alpha) and a permutation of the batch; the
    output of layer k is replaced by ``lam * h + (1 - lam) * h[partners]`` and every loss of the labels becomes
    ``lam * loss(y) + (1 - lam) * loss(y[partners])``. Module, loss, metrics and data stay as they are. Validation,
    test and predict are not touched.

    Before backward it is checked that the state was mixed at layer k, and that a loss has used the mixed target. A
    Trainer takes one such callback.

    Args:
        alpha: parameter of Beta(alpha, alpha), or a schedule of it (``{start: 0.2, end: 2.0, epochs: 20}`` in YAML). 2
            is the paper's choice for CIFAR and SVHN. 0 switches mixing off: training is that without the callback, bit
            for bit.
        layers: S, as names relative to the LightningModule (``"model.layer1"``), globs (``"model.layer*"``) and
            ``"input"``. A layer that a skip connection bypasses is refused at the first batch. ``"auto"`` takes the
            input and the first half of the network's stages, found by observing the first training batch, which is not
            mixed.
        probability: share of the batches that are mixed.
        input_key: where the input is in a batch: an index or a name, with dots for nested batches (``"labelled.0"``),
            or a list of those for several inputs. None finds it. Only needed if S has the input.
        target_key: where the target is, likewise.
        batch_dim: the dimension of hidden states that counts the samples. None: the first of 0 and 1 with their number.
        seed: of lam, permutation and k; None follows ``seed_everything``. The global generators are never used.
        log_mixing: whether to log ``manifold_mixup/lam``, ``manifold_mixup/layer`` (the index of k in S) and the loss
            for each layer, ``manifold_mixup/loss/<layer>``.

    Raises:
        ValueError: for a wrong argument, at construction; for layers or batch keys that are not there, in fit.
        MixingError: in fit, before the optimizer steps, when a batch could not be mixed as planned.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[ManifoldMixupCallback(alpha=2.0)])
    """

    def __init__(
        self,
        alpha: float | AlphaSchedule = 2.0,
        layers: str | list[str] = "auto",
        probability: float = 1.0,
        input_key: int | str | list[int | str] | None = None,
        target_key: int | str | list[int | str] | None = None,
        batch_dim: int | None = None,
        seed: int | None = None,
        log_mixing: bool = False,
    ) -> None:
        if not isinstance(alpha, AlphaSchedule):
            check_alpha(alpha)
        if not 0 <= probability <= 1:
            raise ValueError(f"Expected a probability in [0, 1], got {probability}.")
        if not layers:
            raise ValueError("Expected at least one layer to mix, got none. Name some, or use layers='auto'.")
        self.alpha = alpha
        self.layers = layers
        self.probability = probability
        self.input_key = input_key
        self.target_key = target_key
        self.batch_dim = batch_dim
        self.seed = seed
        self.log_mixing = log_mixing
        self._keys = Keys(inputs=_listed(input_key), targets=_listed(target_key))
        self._plan = _Plan()
        self._hooks: _Hooks | None = None
        self._step: MixedStep | None = None

    def should_mix(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """When to mix. Override it, for instance to leave the last epochs unmixed; the same on all ranks."""
        return True

    # ------------------------------------------------------------------------------------------ the life of a fit

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = [c for c in trainer.callbacks if isinstance(c, ManifoldMixupCallback)]  # type: ignore[attr-defined]
        if len(callbacks) > 1:
            raise MisconfigurationException(
                f"Expected one ManifoldMixupCallback in the Trainer, got {len(callbacks)}: a batch is mixed once. A "
                "ManifoldMixupModule brings its own; give it alpha=0 to use another."
            )
        if stage == "fit" and is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                "Expected a `training_step(batch, batch_idx)`, got one that takes its batches from `dataloader_iter`: "
                "they cannot be mixed on the way. Take `batch` as the argument."
            )
        if stage == "fit":  # a resumed run loads its plan after this; another network needs another one
            self._plan = _Plan()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make_plan(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()
        self._make_plan(trainer, pl_module)  # again: sharded strategies load checkpoints after on_fit_start
        if self.alpha == 0 or self.probability == 0:
            return
        self._hooks = _Hooks(pl_module)
        self._hooks.add_metrics()
        if self._plan.layers is not None:
            self._hooks.add_layers(self._plan.layers, self.batch_dim)
            self._hooks.add_criteria(self._plan.criteria)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._disarm()
        alpha = self.alpha(trainer.current_epoch) if isinstance(self.alpha, AlphaSchedule) else self.alpha
        if self._hooks is None or alpha == 0 or not self.should_mix(trainer, batch_idx):
            return
        count = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        shared = generator(self._plan.seed, count, stream=0)
        own = generator(self._plan.seed, count, stream=1 + trainer.global_rank)
        if shared.random() >= self.probability:
            return
        sample = sample_of(batch, self._keys)
        if self._plan.layers is None:  # layers="auto": this batch is observed as it is
            layer, mix = None, Mix(torch.tensor(1.0), torch.arange(len(sample)))
        else:
            layer = self._plan.layers[shared.integers(len(self._plan.layers))]
            mix = draw_mix(len(sample), alpha, own)
        hook = self._hooks.layers.get(layer) if layer else None
        self._step = MixedStep(
            pl_module, self._keys, mix.to(sample.device), self._hooks.metrics, layer, hook, self.batch_dim
        )
        self._step.arm(None if self._plan.checked else self._observer(self._step, trainer))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._step is not None:
            self._step.check_halves()

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._step is not None:
            self._step.check_halves()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step is not None and self.log_mixing:
            self._log(self._step, outputs)
        self._disarm()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def _make_plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What the arguments say goes before what a checkpoint says."""
        if self.layers != "auto":
            names = resolve_layers(pl_module, [self.layers] if isinstance(self.layers, str) else self.layers)
            if names != self._plan.layers:
                self._plan = _Plan(layers=names, seed=self._plan.seed)
        if self.seed is not None:
            self._plan.seed = self.seed
        elif self._plan.seed is None:
            self._plan.seed = trainer.strategy.broadcast(global_seed())

    def _disarm(self) -> None:
        if self._step is not None:
            self._step.disarm()
            self._step = None

    def _restore(self) -> None:
        self._disarm()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    # ------------------------------------------------------------------------------------------- checkpoints, copies

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self._plan))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._plan = _Plan(**state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_hooks": None, "_step": None}

    # -------------------------------------------------------------------------------------------- the first batch

    def _observer(self, step: MixedStep, trainer: pl.Trainer) -> Callable[..., Any]:
        """Wraps the first training step that is mixed: the layers are checked on it, or chosen."""

        def observer(training_step: Callable[..., Any]) -> Callable[..., Any]:
            def observed(batch: Any, *args: Any, **kwargs: Any) -> Any:
                targets = self._keys.find_targets(batch)
                labels = [part for key in targets for part in labellings(batches.get(batch, key))]
                with ExitStack() as stack:
                    criteria = {name: CriterionHooks() for name in criterion_candidates(step.module)}
                    for name, hooks in criteria.items():
                        hooks.register(named_layers(step.module)[name], stack)
                    seen = stack.enter_context(
                        observe(
                            step.module,
                            inputs=list(batches.without(batch, targets)),
                            targets=labels,
                            batch_size=len(labels[0]),
                            batch_dim=self.batch_dim,
                        )
                    )
                    leaks = stack.enter_context(Leaks())
                    output = training_step(batch, *args, **kwargs)
                if leaks.found:
                    raise step.leaked_target(leaks.found)
                # None: the user skips this batch; under manual optimization it is what steps return.
                if output is not None or not step.module.automatic_optimization:
                    report = seen.report()
                    if not report.sinks_found:
                        if not step.loss_used_labels:
                            raise step.unused_target()
                        report = seen.report(outputs=output)  # a criterion took the labels where no tensor shows it
                    self._settle(trainer, report, [name for name, hooks in criteria.items() if hooks.fired])
                return output

            return observed

        return observer

    def _settle(self, trainer: pl.Trainer, report: LayerReport, criteria: list[str]) -> None:
        """Fixes S and the criteria for the rest of the fit, by what was observed."""
        plan, hooks = self._plan, self._hooks
        assert hooks is not None
        if plan.layers is None:
            plan.layers = trainer.strategy.broadcast(report.default)
            self._announce(plan.layers)
            hooks.add_layers(plan.layers, self.batch_dim)
        elif refusals := [refusal for name in plan.layers if (refusal := report.refusal(name))]:
            raise MisconfigurationException("\n".join(refusals))
        for name, hook in hooks.layers.items():
            row = report.row(name)
            if report.batch_size > 1:  # of one sample no shape tells which dimension counts it
                hook.settle(row.batch_dims)
            sequence = any(len(shape) == 3 for shape in row.shapes)  # which may be time-major, as no image is
            if row.ambiguous and sequence:
                rank_zero_warn(
                    f"The output of {name!r} has shape {row.shapes[0]}: two dimensions have the size of the batch. The "
                    f"samples are taken to be in dimension {row.batch_dim}; set `batch_dim` to say so, or otherwise."
                )
        plan.criteria = criteria
        hooks.add_criteria(criteria)
        plan.checked = True

    def _announce(self, layers: list[str]) -> None:
        why = "`manifold-mixup layers` and `print(eligible_layers(model, x))` show why"
        if not layers:
            raise MisconfigurationException(f"layers='auto' found no place where the whole state can be mixed; {why}.")
        if layers == [INPUT]:
            rank_zero_warn(f"layers='auto' found no eligible layer but the input, so this is input mixup; {why}.")
        else:
            rank_zero_info(
                f"Manifold Mixup mixes each batch at one of S = {{{', '.join(layers)}}} (layers='auto'; {why})."
            )

    # ---------------------------------------------------------------------------------------------------- logging

    def _log(self, step: MixedStep, outputs: Any) -> None:
        if step.layer is None:
            return
        assert self._plan.layers is not None
        values: dict[str, Any] = {
            "manifold_mixup/lam": step.mix.lam,
            # Not a number: Lightning would copy it to the device, and wait for that.
            "manifold_mixup/layer": torch.full_like(step.mix.lam, self._plan.layers.index(step.layer)),
        }
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            values[f"manifold_mixup/loss/{step.layer}"] = loss
        n = len(step.mix.partners)
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=n)  # type: ignore[attr-defined]


@dataclass
class _Plan:
    """What is settled once, and saved in the checkpoint.

    Attributes:
        layers: S; None until the first batch has been observed.
        checked: whether the layers of S have been found eligible, or been chosen.
        criteria: names of the criterion modules that were handed labels in superposition.
        seed: of all draws.
    """

    layers: list[str] | None = None
    checked: bool = False
    criteria: list[str] = field(default_factory=list)
    seed: int | None = None


class _Hooks:
    """The hooks on the user's modules during a fit."""

    def __init__(self, pl_module: nn.Module) -> None:
        self._module = pl_module
        self._named = named_layers(pl_module)
        self._stack = ExitStack()
        self.layers: dict[str, MixingHook] = {}
        self.metrics: list[nn.Module] = []

    def add_metrics(self) -> None:
        self.metrics = list(metrics_of(self._module))
        for metric in self.metrics:
            self._stack.callback(metric.register_forward_pre_hook(hand_plain_labels, with_kwargs=True).remove)

    def add_layers(self, names: list[str], batch_dim: int | None) -> None:
        for name in names:
            if name != INPUT:
                self.layers[name] = MixingHook(batch_dim)
                self._stack.callback(self._named[name].register_forward_hook(self.layers[name]).remove)
        if compiled_parts(self._module):
            self._stack.enter_context(fresh_graphs(len(names)))

    def add_criteria(self, names: list[str]) -> None:
        for name in names:
            CriterionHooks().register(self._named[name], self._stack)

    def remove(self) -> None:
        self._stack.close()


def _listed(key: int | str | list[int | str] | None) -> list[int | str | None]:
    return list(key) if isinstance(key, list) else [key]
