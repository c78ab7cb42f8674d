"""One training step under Manifold Mixup: the mixed batch goes in, a checked and plain result comes out."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_manifold_mixup._step import batch as batches
from lightning_manifold_mixup._step.batch import Key
from lightning_manifold_mixup._step.criteria import clean_states
from lightning_manifold_mixup._step.targets import MixingError, Superposition, plain, superpositions
from lightning_manifold_mixup.layers import INPUT
from lightning_manifold_mixup.mixing import Mix, MixingHook

Observer = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Keys:
    """Where the inputs and the targets of a batch are; see :func:`lightning_manifold_mixup._step.batch.find`."""

    inputs: list[Key | None]
    targets: list[Key | None]

    def find_targets(self, batch: Any) -> list[Key]:
        """The keys of the targets in this batch."""
        return [batches.find(batch, "target", key) for key in self.targets]

    def find_inputs(self, batch: Any) -> list[Key]:
        """The keys of the inputs in this batch, for mixing at the input.

        Raises:
            ValueError: if other tensors might be inputs, too: mixing only some of them would mix a part of the state.
        """
        keys = [batches.find(batch, "input", key) for key in self.inputs]
        others = [
            t for t in batches.without(batch, keys + self.find_targets(batch)) if t.is_floating_point() and t.ndim
        ]
        if others and self.inputs == [None]:
            raise ValueError(
                f"Expected one floating point input, found {keys[0]!r} and others beside it. Set `input_key` to the "
                f"key of the input, or to a list of them if there are several. The batch is:\n{batches.describe(batch)}"
            )
        return keys


def sample_of(batch: Any, keys: Keys) -> Tensor:
    """A target tensor, from which the number of samples and the device are known.

    Raises:
        TypeError: if the target is not a tensor or a structure of tensors (as the lists of dicts of detection).
        ValueError: if the targets hold different numbers of samples.
    """
    found = keys.find_targets(batch)
    leaves: list[Tensor] = []
    for key in found:
        target = batches.get(batch, key, "target")
        of_samples = isinstance(target, (list, tuple)) and any(isinstance(item, Mapping) for item in target)
        leaves += [] if of_samples else batches.tensors(target)
    if not leaves:
        raise TypeError(
            f"Expected a target made of tensors with one entry a sample at {found}, and found none that can be mixed "
            "(detection-style targets, a list with a dict for each image, have no mixture). Set `target_key`, or leave "
            f"the callback out. The batch is:\n{batches.describe(batch)}"
        )
    if len({len(leaf) if leaf.ndim else 0 for leaf in leaves}) > 1:
        raise ValueError(f"Expected targets of one number of samples. The batch is:\n{batches.describe(batch)}")
    return leaves[0]


class MixedStep:
    """The training step of one batch.

    Args:
        module: whose ``training_step`` is run.
        keys: where inputs and targets are in the batch.
        mix: the draw, on the batch's device.
        layer: the drawn layer k, or None for a batch that is only observed.
        metrics: the torchmetrics modules inside ``module``; to look for them at each step takes longer than to mix.
        hook: the hook at that layer, or None if it is the input.
        batch_dim: of the input; see :meth:`Mix.__call__`.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        keys: Keys,
        mix: Mix,
        metrics: Sequence[nn.Module] = (),
        layer: str | None = None,
        hook: MixingHook | None = None,
        batch_dim: int | None = None,
    ) -> None:
        self.module, self.keys, self.mix, self.layer, self.hook = module, keys, mix, layer, hook
        self.metrics = metrics
        self.batch_dim = batch_dim
        self._superposition: Superposition | None = None
        self._undo = ExitStack()

    def arm(self, observer: Observer | None = None) -> None:
        """Puts this step in the place of the module's ``training_step``, until :meth:`disarm`."""
        original = self.module.training_step
        attributes = self.module.__dict__
        if "training_step" in attributes:  # Lightning puts the compiled step there
            self._undo.callback(attributes.__setitem__, "training_step", original)
        else:
            self._undo.callback(attributes.pop, "training_step", None)
        attributes["training_step"] = _StandIn(self, original, observer)
        if self.hook is not None:
            self.hook.mix, self.hook.observed = self.mix, observer is not None
            self._undo.callback(setattr, self.hook, "mix", None)

    def disarm(self) -> None:
        """Takes everything back; tensors that are still in superposition are plain from now on."""
        self._undo.close()
        if self._superposition is not None:
            self._superposition.close()

    def run(self, training_step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The user's step on the mixed batch. An LBFGS closure comes here several times, and is mixed the same."""
        if self.hook is not None:
            self.hook.fired = False
        output = training_step(self.mixed(batch), *args, **kwargs)
        self.check(output)
        clean_states(self.metrics)
        return plain(output)

    def mixed(self, batch: Any) -> Any:
        """The batch that the user's step is handed; the batch itself stays as it is."""
        if self._superposition is not None:
            self._superposition.close()
        target_keys = self.keys.find_targets(batch)
        targets = self.mix.target({str(key): batches.get(batch, key, "target") for key in target_keys})
        self._superposition = next(iter(superpositions(targets)), None)
        input_keys = self.keys.find_inputs(batch) if self.layer == INPUT else []
        for key in input_keys:
            batch = batches.replaced(batch, key, self._mixed_input(batches.get(batch, key, "input"), key))
        for key in target_keys:
            batch = batches.replaced(batch, key, targets[str(key)])
        return batch

    def _mixed_input(self, value: Any, key: Key) -> Any:
        if not any(t.is_floating_point() for t in batches.tensors(value)):
            raise ValueError(
                f"'input' is in S, but the input at {key!r} is {batches.describe(value, '')}: integers, such as token "
                "ids, have no mixture. Take 'input' out of `layers` and mix after the embedding instead."
            )
        try:
            return self.mix(value, self.batch_dim)
        except MixingError as error:
            raise MixingError(f"The input at {key!r} and the target do not hold the same samples. {error}") from None

    # ---------------------------------------------------------------------------------------------------------- checks

    def check(self, output: Any) -> None:
        """Whether the whole promise was kept: the state mixed at layer k, and a loss that used the mixed target.

        Raises:
            MixingError: if not.
        """
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if self.module.automatic_optimization and loss is None:  # the user skips this batch
            return
        if not self._state_mixed:
            self._raise_unmixed()
        if not self._target_used:
            raise self.unused_target()

    def check_halves(self) -> None:
        """Before a backward pass or an optimizer step of the user's own: no mixed labels on states that are not mixed.

        Raises:
            MixingError: if only one half of the promise was kept so far.
        """
        if self._superposition is not None and self._target_used and not self._state_mixed:
            self._raise_unmixed()

    @property
    def _state_mixed(self) -> bool:
        return self.hook is None or self.hook.fired

    @property
    def loss_used_labels(self) -> bool:
        """Whether labels in superposition have led to a value with a gradient."""
        return self._superposition is not None and self._superposition.used

    @property
    def _target_used(self) -> bool:
        return self._superposition is None or self._superposition.used  # a float target is a tensor like any other

    @property
    def _where(self) -> str:
        trainer = self.module.trainer
        return f"Manifold Mixup, epoch {trainer.current_epoch}, step {trainer.global_step}, layer {self.layer!r}:"

    def unused_target(self) -> MixingError:
        """The error for a batch whose mixed target no loss has used."""
        keys = ", ".join(map(repr, self.keys.targets)) if self.keys.targets != [None] else "found by itself"
        return MixingError(
            f"{self._where} the target was mixed, but no loss with a gradient used it. Either the loss takes its "
            f"labels from elsewhere: check `target_key` ({keys}). Or they went through something that cannot keep them "
            "(numpy, `.item()`, a scripted function): compute the loss with `mixed_loss(function, logits, y)` or in a "
            "criterion module. Nothing was updated."
        )

    def leaked_target(self, where: str) -> MixingError:
        """The error for a loss that has read the labels past their superposition."""
        return MixingError(
            f"{self._where} {where} read the mixed target as plain labels, so a part of the loss would be that of the "
            "dominant labels alone. TorchScript, torch.vmap and `torch.tensor(y)` do not know of labels in "
            "superposition: compute that part with `mixed_loss(function, logits, y)` or in a criterion module (or, for "
            "a metric, under `torch.no_grad()`). Nothing was updated."
        )

    def _raise_unmixed(self) -> None:
        raise MixingError(
            f"{self._where} expected the output of this layer to be mixed in training_step, but it was not: the layer "
            "was not called, or only under torch.no_grad() or in eval mode. Take it out of `layers`, or call "
            "`.train()` on it; if the network was compiled and run before this fit, call `torch._dynamo.reset()` "
            "first. Nothing was updated."
        )


class _StandIn:
    """What stands in the place of ``training_step`` for one batch."""

    def __init__(self, step: MixedStep, original: Callable[..., Any], observer: Observer | None) -> None:
        self.step, self.original, self.observer = step, original, observer
        self.__wrapped__ = inspect.unwrap(original)  # Lightning reads the signature there

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.step.run(self.observer(self.original) if self.observer else self.original, *args, **kwargs)

    # A copy of the module gets its own training step back, which is not mixed.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.step.module)]
        return types.MethodType(type(copied).training_step, copied)

    def __reduce__(self) -> Any:
        return getattr, (self.step.module, "training_step")
