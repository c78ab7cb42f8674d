"""The user's modules that are handed labels in superposition: criteria and metrics.

Operation by operation, ``operations.py`` evaluates straight-line tensor code. A criterion module can be evaluated as a
whole, which also holds for one that branches on the labels, goes through numpy or calls a custom ``autograd.Function``.
A metric is never handed a superposition: it sees the dominant labels, as plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_manifold_mixup._step.check.ghost import ghost_of
from lightning_manifold_mixup._step.check.random_states import random_states, replayed
from lightning_manifold_mixup._step.labels.pairs import note_use, paired, tensors
from lightning_manifold_mixup._step.labels.targets import (
    Superposed,
    Superposition,
    SuperpositionError,
    labellings,
    plain,
    superpositions,
)
from lightning_manifold_mixup.layers import named_layers


class CriterionHooks:
    """Evaluates a criterion module on both labellings whenever it is handed labels in superposition.

    The criterion itself sees the dominant labels, in one ordinary call; a ghost of it sees the others.

    Attributes:
        fired: whether that has happened.
        unfit: whether the module turned out to be no criterion: it returns labels or inputs, as an augmentation does.
    """

    def __init__(self) -> None:
        self.fired = False
        self.unfit = False
        self._others: list[Any] = []  # one entry for each call in progress: a ghost, and what it is to be called with

    def register(self, criterion: nn.Module, stack: ExitStack) -> CriterionHooks:
        """Register the hooks; closing ``stack`` removes them."""
        stack.callback(criterion.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        stack.callback(criterion.register_forward_hook(self.after, with_kwargs=True, always_call=True).remove)
        return self

    def before(self, criterion: nn.Module, args: Any, kwargs: Any) -> Any:
        """Let the module run on the dominant labels."""
        found = superpositions((args, kwargs))
        if len(found) != 1:
            self._others.append(None)
            return None
        self.fired = True
        states = random_states(criterion.parameters())
        ghost = ghost_of(criterion)
        kept = {id(value) for _, _, value in _kept(criterion)}
        dominant, other = labellings((args, kwargs))
        self._others.append((found[0], ghost, states, kept, *other))
        return dominant

    def after(self, criterion: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Run it once more on the others, and put both results into superposition."""
        other = self._others.pop()
        if other is None or output is None:  # None: the criterion raised
            return None
        superposition, ghost, states, kept, args, kwargs = other
        with replayed(criterion.parameters(), states):
            second = ghost.forward(*args, **kwargs)
        recorded = note_use(superposition, (output, second))
        self.unfit |= not all(_is_loss(tensor) for tensor in tensors(output))
        # Tensors that it keeps for the step to read (``self.last``) are put into superposition, too.
        others = {(number, name): value for number, name, value in _kept(ghost)}
        for number, name, value in list(_kept(criterion)):
            if id(value) not in kept and (number, name) in others:
                part = list(criterion.modules())[number]
                vars(part)[name] = paired(value, others[number, name], superposition, averaged=False)
        try:
            return paired(output, second, superposition, averaged=recorded)
        except SuperpositionError as error:
            superposition.give_up(error)
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> CriterionHooks:
        copied: CriterionHooks = memo.setdefault(id(self), CriterionHooks())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return vars(CriterionHooks())


def _kept(module: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
    """Yield the tensors that a module's parts keep as plain attributes: number of the part, name, tensor."""
    for number, part in enumerate(module.modules()):
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                yield number, name, value


def _is_loss(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and (tensor.requires_grad or tensor.ndim == 0)


def criterion_candidates(module: nn.Module) -> list[str]:
    """Return the names of the outermost modules that hold no weights (parameters of two or more dimensions).

    Without weights a module is no part of the network that is trained. PyTorch's own modules are straight-line tensor
    code, metrics have a way of their own, and TorchScript takes no hooks.
    """
    found: list[str] = []
    for name, candidate in named_layers(module).items():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        weights = any(parameter.ndim >= 2 for parameter in candidate.parameters())
        known = all(type(part).__module__.startswith("torch.nn.") for part in candidate.modules())
        unfit = isinstance(candidate, (Metric, MetricCollection, torch.jit.ScriptModule))
        if not (inside or weights or known or unfit):
            found.append(name)
    return found


def criterion_hooks(module: nn.Module, without: Iterable[str] = ()) -> dict[str, CriterionHooks]:
    """Return the hooks on the criteria of a module or its ghost, by name; those of ``without`` are taken off first."""
    found = {}
    for name, part in named_layers(module).items():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for number, hook in list(hooks.items()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, CriterionHooks):
                    if name in without:
                        del hooks[number]
                    else:
                        found[name] = owner
    return found


def plain_metrics(module: nn.Module, stack: ExitStack) -> None:
    """Let the metrics of a module see the dominant labels; closing ``stack`` takes that back.

    What they compute from them counts as read by Python code: a loss may use it.
    """
    fed: list[Superposition] = []
    for metric in {id(metric): metric for metric in _metrics(module)}.values():  # each once
        own = vars(metric)

        def plain_update(*args: Any, _update: Any = metric.update, **kwargs: Any) -> None:
            fed[:] = [a.superposition for a in (*args, *kwargs.values()) if isinstance(a, Superposed)]
            _update(*plain(args), **plain(kwargs))

        def read_compute(*args: Any, _compute: Any = metric.compute, **kwargs: Any) -> Any:
            value = _compute(*args, **kwargs)
            if not fed or not fed[0].open or fed[0].reader is None:
                return value
            less, more = (apply_to_collection(value, Tensor, lambda t, by=by: t + by) for by in (-1, 1))
            return fed[0].reader("compute", less, more, value)

        for name, function in (("update", plain_update), ("compute", read_compute)):
            stack.callback(own.__setitem__, name, own.get(name, getattr(metric, name)))
            own[name] = function


def _metrics(module: nn.Module) -> Iterator[Metric]:
    """Return the metrics inside a module, also those in lists and dicts that are no modules."""
    for part in module.modules():
        if isinstance(part, Metric):
            yield part
        for value in list(vars(part).values()):
            items = value.values() if isinstance(value, dict) else value
            for item in list(items) if isinstance(value, (dict, list, tuple)) else [value]:
                if isinstance(item, (Metric, MetricCollection)):
                    yield from (m for m in item.modules() if isinstance(m, Metric))
