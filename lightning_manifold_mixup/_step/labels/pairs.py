"""Results for two labellings, put into superposition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_manifold_mixup._step.labels.targets import Superposition, SuperpositionError

REMEDY = (
    "Put the computation into a function and call `mixed_loss(function, logits, y)`, or into a criterion module "
    "(nn.Module): both are evaluated as a whole, once for each labelling."
)


def paired(
    first: Any, second: Any, superposition: Superposition, *, steady: bool = False, averaged: bool = True
) -> Any:
    """Make one result of those for the two labellings, in their structure."""
    if isinstance(first, Tensor):
        averaged = averaged and first.is_floating_point()
        return superposition.hold(first, second, steady=steady, averaged=averaged)
    of_both = partial(paired, superposition=superposition, steady=steady, averaged=averaged)
    if isinstance(first, (tuple, list)) and not isinstance(first, torch.Size):
        if len(first) == len(second):
            pairs = [of_both(a, b) for a, b in zip(first, second, strict=True)]
            return type(first)(*pairs) if hasattr(first, "_fields") else type(first)(pairs)
    elif isinstance(first, dict):
        if first.keys() == second.keys():
            return {key: of_both(first[key], second[key]) for key in first}
    elif first is second or first == second:
        return first
    raise SuperpositionError(
        f"Python code would go on with {first!r} for the dominant labels and with {second!r} for the others. {REMEDY}"
    )


def note_use(superposition: Superposition, results: Any) -> bool:
    """Note whether a value with a gradient has come of labels in superposition, and return that."""
    recorded = any(tensor.requires_grad for tensor in tensors(results))
    superposition.used |= recorded
    return recorded


def tensors(tree: Any) -> Iterator[Tensor]:
    """Return the tensors among the arguments or results of a torch function: nested tuples, lists and dicts at most."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)
