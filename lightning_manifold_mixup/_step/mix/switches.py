"""Which contexts are open: ``with mixing(...)`` and ``with unmixed():``.

Counted for the whole process, not for a thread or a task: the backward pass recomputes checkpointed layers in a thread
of its own, and ``nn.DataParallel`` runs its replicas in threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning_manifold_mixup._step.labels.targets import MixingError

_mixing = 0
_unmixed = 0
_input_mixed = 0


@contextmanager
def mixing_opened() -> Iterator[None]:
    """Tell ``mixing_is_open`` that a ``with mixing(...)`` is open."""
    global _mixing
    _mixing += 1
    try:
        yield
    finally:
        _mixing -= 1


def mixing_is_open() -> bool:
    """Whether a ``with mixing(...)`` is open, so that the loss of plain labels would not be that of mixed ones.

    Example:
        >>> mixing_is_open()
        False
    """
    return _mixing > 0


@contextmanager
def unmixed() -> Iterator[None]:
    """Mix nothing while it is open: a clean forward pass, with gradients, inside a step whose batch is mixed.

    It stops the mixing of hidden states. The labels of the step stay mixed (``y.labels`` are the original ones), and so
    does an input that was mixed. Keep it open during ``backward()`` if layers of the clean pass are recomputed there
    (activation checkpointing).

    Raises:
        MixingError: in a training step whose input was mixed, so that there is no clean pass: take ``"input"`` out of
            S, or use ``clean_weight``.

    Example:
        >>> import torch
        >>> from lightning_manifold_mixup import Mix, mixing
        >>> net, x = torch.nn.Identity(), torch.tensor([[0.0], [4.0]])
        >>> with mixing(net, Mix(torch.tensor(0.75), torch.tensor([1, 0]))):
        ...     mixed = net(x)
        ...     with unmixed():
        ...         clean = net(x)
        >>> mixed.tolist(), clean.tolist()
        ([[1.0], [3.0]], [[0.0], [4.0]])
    """
    global _unmixed
    if _input_mixed:
        raise_input_is_mixed()
    _unmixed += 1
    try:
        yield
    finally:
        _unmixed -= 1


class _InputMixed:
    def __enter__(self) -> None:
        global _input_mixed
        _input_mixed += 1

    def __exit__(self, *exception: Any) -> None:
        global _input_mixed
        _input_mixed -= 1


input_mixed: AbstractContextManager[None] = _InputMixed()
"""A training step runs, and its input is mixed."""
nothing: AbstractContextManager[None] = nullcontext()
"""It runs, and its input is not."""


def raise_input_is_mixed() -> None:
    """Raise the error for ``unmixed`` in a step whose input is mixed."""
    raise MixingError(
        "`with unmixed():` in a step whose input is mixed (k is 'input'): a forward pass on it would not be clean. Use "
        "`clean_weight` of the callback, which runs the step on the plain batch beside it, or take 'input' out of "
        "`layers`."
    )


def is_unmixed() -> bool:
    """Whether a ``with unmixed():`` is open.

    Example:
        >>> with unmixed():
        ...     is_unmixed()
        True
    """
    return _unmixed > 0
