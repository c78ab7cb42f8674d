"""A function of labels, evaluated as a whole on both labellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_manifold_mixup._step.labels.pairs import note_use, paired, tensors
from lightning_manifold_mixup._step.labels.targets import (
    MixingError,
    SuperpositionError,
    labellings,
    plain,
    superpositions,
)
from lightning_manifold_mixup._step.mix.switches import mixing_is_open

T = TypeVar("T")


def mixed_loss(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Evaluate a function of (logits, labels) as a whole on both labellings: ``lam * f(y) + (1 - lam) * f(partners)``.

    Exact for any code, also where labels in superposition cannot go (control flow that depends on labels, numpy,
    custom ``autograd.Function``), at the price of a second evaluation of the function alone.

    Args:
        function: returns a floating point tensor, or a tuple, list or dict of them.
        *args: its arguments; any of them may be, or contain, a ``MixedTarget``.
        **kwargs: its keyword arguments, likewise.

    Returns:
        The mixed value as a plain tensor. Without a MixedTarget among the arguments: ``function(*args, **kwargs)``.

    Raises:
        MixingError: for labels of several draws in one call.

    Example:
        >>> import torch
        >>> from lightning_manifold_mixup import MixedTarget
        >>> import torch.nn.functional as F
        >>> y = MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor(0.75))
        >>> mixed_loss(lambda logits, y: F.nll_loss(logits, y) ** 2, torch.tensor([[0.0, 2.0], [0.0, 4.0]]), y)
        tensor(3.2500)
    """
    found = superpositions((args, kwargs))
    if not found:
        if mixing_is_open() and any(not t.is_floating_point() for t in tensors((args, kwargs))):
            rank_zero_warn(
                "`mixed_loss` got plain labels inside `with mixing(...)`: the states are mixed, and the labels are "
                "not. Hand it `mix.target(y)`."
            )
        return function(*args, **kwargs)
    if len(found) > 1:
        raise MixingError("Expected labels of one mix, got labels of several draws of lam in one call.")
    if found[0].lam.ndim:  # one for each sample: they count before the samples are summed up
        return plain(function(*args, **kwargs))  # type: ignore[no-any-return]
    first, second = (function(*some, **others) for some, others in labellings((args, kwargs)))
    note_use(found[0], (first, second))
    try:
        return plain(paired(first, second, found[0]))  # type: ignore[no-any-return]
    except SuperpositionError as error:
        found[0].give_up(error)
    return first
