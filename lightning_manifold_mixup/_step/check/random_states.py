"""The states of the global random generators: noted, set again, compared."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def random_states(parameters: Iterable[nn.Parameter]) -> tuple[Any, ...]:
    """Return the states of the global generators of PyTorch (also on the parameters' devices), Python and NumPy.

    Example:
        >>> states = random_states([])
        >>> first = torch.rand(2)
        >>> set_random_states(states)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    on_devices = tuple((device, torch.cuda.get_rng_state(device)) for device in devices)
    return torch.get_rng_state(), on_devices, random.getstate(), np.random.get_state()


def set_random_states(states: tuple[Any, ...]) -> None:
    """Set the generators back to what ``random_states`` gave."""
    host, on_devices, python, numpy = states
    torch.set_rng_state(host)
    for device, state in on_devices:
        torch.cuda.set_rng_state(state, device)
    random.setstate(python)
    np.random.set_state(numpy)


def same_random_states(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether no random number was drawn between the two."""
    numpy = all(np.array_equal(a, b) for a, b in zip(first[3], second[3], strict=True))
    devices = all(torch.equal(a, b) for (_, a), (_, b) in zip(first[1], second[1], strict=True))
    return numpy and devices and first[2] == second[2] and torch.equal(first[0], second[0])


@contextmanager
def replayed(parameters: Iterable[nn.Parameter], states: tuple[Any, ...] | None = None) -> Iterator[None]:
    """Draw random numbers from given states inside; afterwards the generators are as if none had been drawn.

    Args:
        parameters: on whose devices there are generators, too.
        states: to begin with, of ``random_states``; None goes on with the present ones.

    Example:
        >>> states = random_states([])
        >>> first = torch.rand(2)
        >>> with replayed([], states):
        ...     again = torch.rand(2)
        >>> torch.equal(first, again), torch.equal(first, torch.rand(2))
        (True, False)
    """
    after = random_states(parameters)
    if states is not None:
        set_random_states(states)
    try:
        yield
    finally:
        set_random_states(after)
