"""Which contexts are open: ``with mixing(...)`` and ``with unmixed():``.

Counted for the whole process, not for a thread or a task: the backward pass recomputes checkpointed layers in a thread
of its own, and ``nn.DataParallel`` runs its replicas in threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class _Switch:
    """Open while at least one context is. Asked for a bool, since torch.compile makes a graph for each number."""

    def __init__(self) -> None:
        self.depth = 0
        self.is_open = False

    @contextmanager
    def open(self) -> Iterator[None]:
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self.depth += by
        self.is_open = self.depth > 0


_mixing = _Switch()
_unmixed = _Switch()


@contextmanager
def mixing_opened() -> Iterator[None]:
    """What ``with mixing(...)`` opens for :func:`mixing_is_open`."""
    with _mixing.open():
        yield


def mixing_is_open() -> bool:
    """Whether a ``with mixing(...)`` is open, so that the loss of plain labels would not be that of mixed ones.

    Example:
        >>> mixing_is_open()
        False
    """
    return _mixing.is_open


@contextmanager
def unmixed() -> Iterator[None]:
    """Mixes nothing while it is open: a clean forward pass, with gradients, inside a step whose batch is mixed.

    It stops the mixing of hidden states. The labels of the step stay mixed (``y.labels`` are the original ones), and so
    does an input that was mixed. Keep it open during ``backward()`` if layers of the clean pass are recomputed there
    (activation checkpointing).

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
    with _unmixed.open():
        yield


def is_unmixed() -> bool:
    """Whether a ``with unmixed():`` is open.

    Example:
        >>> with unmixed():
        ...     is_unmixed()
        True
    """
    return _unmixed.is_open
