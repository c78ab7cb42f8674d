"""Tells cheaply after each batch whether a training step is built as before: by modes and the size of its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from operator import attrgetter

import torch
from torch import nn

_is_training = attrgetter("training")

nodes_made: Callable[[], int] = getattr(torch.autograd, "_get_sequence_nr", lambda: 0)
"""How many nodes of autograd graphs this thread has made; 0 in a torch that does not tell."""


def modes_of(modules: Iterable[nn.Module]) -> tuple[bool, ...]:
    """Return the modes of some modules; called for each batch."""
    return tuple(map(_is_training, modules))


@cache
def reads_mode(kind: type) -> bool:
    """Whether modules of a class may behave differently in eval mode: all but PyTorch's own that do not read the mode.

    A linear layer does not. Fewer flags are read faster: those of a large network lie far apart in memory.
    """
    if not kind.__module__.startswith("torch.nn."):
        return True
    functions = [function for cls in kind.__mro__ if cls is not nn.Module for function in vars(cls).values()]
    return any("training" in getattr(getattr(f, "__code__", None), "co_names", ()) for f in functions)
