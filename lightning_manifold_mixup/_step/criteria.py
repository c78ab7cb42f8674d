"""Modules of the user's that are handed labels in superposition: criteria and metrics.

Op by op, ``targets.py`` evaluates almost any loss exactly. A criterion module can be evaluated as a whole, which also
holds for those that branch on the labels, go through numpy or call a custom ``autograd.Function``. A metric must never
meet a superposition at all: its state would keep it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_manifold_mixup._step.targets import first_labelling, paired, plain, second_labelling, superpositions
from lightning_manifold_mixup.layers import named_layers


class CriterionHooks:
    """Evaluates a criterion module on both labellings whenever it is handed labels in superposition.

    Attributes:
        fired: whether that has happened.
    """

    def __init__(self) -> None:
        self.fired = False
        self._second: list[Any] = []  # one entry for each call in progress: its arguments under the partners' labels

    def register(self, criterion: nn.Module, stack: ExitStack) -> None:
        """Hooks the criterion; closing ``stack`` takes the hooks back."""
        stack.callback(criterion.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        stack.callback(criterion.register_forward_hook(self.after, with_kwargs=True, always_call=True).remove)

    def before(self, criterion: nn.Module, args: Any, kwargs: Any) -> Any:
        """Lets the module run on the original labels."""
        found = superpositions((args, kwargs))
        if len(found) != 1:
            self._second.append(None)
            return None
        self.fired = True
        self._second.append((found[0], second_labelling(args), second_labelling(kwargs)))
        return first_labelling(args), first_labelling(kwargs)

    def after(self, criterion: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Runs it once more on the partners' labels, and puts both results in superposition."""
        pending = self._second.pop()
        if pending is None or output is None:  # None: the criterion raised
            return None
        superposition, args, kwargs = pending
        return paired(output, criterion.forward(*args, **kwargs), superposition)

    def __deepcopy__(self, memo: dict[int, Any]) -> CriterionHooks:
        return CriterionHooks()

    def __getstate__(self) -> dict[str, Any]:
        return vars(CriterionHooks())


def criterion_candidates(module: nn.Module) -> list[str]:
    """Names of the outermost modules that hold no weights (parameters of two or more dimensions), metrics aside.

    Without weights a module is no part of the network that is trained, and running it twice does no harm.
    """
    found: list[str] = []
    for name, candidate in named_layers(module).items():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        weights = any(parameter.ndim >= 2 for parameter in candidate.parameters())
        # PyTorch's own is exact op by op, and then shares the log-probabilities of the two labellings.
        known = type(candidate) is nn.CrossEntropyLoss
        # Metrics have hooks of their own, and TorchScript takes none.
        unfit = isinstance(candidate, (Metric, MetricCollection, torch.jit.ScriptModule))
        if not (inside or weights or known or unfit):
            found.append(name)
    return found


def metrics_of(module: nn.Module) -> Iterator[nn.Module]:
    """The torchmetrics modules inside a module."""
    return (m for m in module.modules() if isinstance(m, (Metric, MetricCollection)))


def hand_plain_labels(metric: nn.Module, args: Any, kwargs: Any) -> Any:
    """Forward pre-hook of a metric: it sees the dominant labels, as a plain tensor."""
    return (plain(args), plain(kwargs)) if superpositions((args, kwargs)) else None


def clean_states(metrics: Iterable[nn.Module]) -> None:
    """Makes plain what ``metric.update(preds, y)``, which no hook sees, may have put into the states of metrics."""
    for metric in metrics:
        if isinstance(metric, Metric):
            for name in metric._defaults:
                setattr(metric, name, plain(getattr(metric, name)))
