"""Random numbers for draws: private, so that the global generators stay untouched, and without a state to save."""

from __future__ import annotations

import os
import secrets
from typing import Any

import numpy as np


def generator(seed: int | None, count: int, stream: int) -> np.random.Generator:
    """Make random numbers that depend on their key alone: there is no state to carry, save or restore.

    Args:
        seed: of the run.
        count: of the batch, so that a resumed run draws what the uninterrupted one would have.
        stream: 0 for draws that all processes share, 1 + rank for those of one process.

    Example:
        >>> generator(0, count=7, stream=0).random() == generator(0, count=7, stream=0).random()
        True
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, count]))


class Stream:
    """The same random numbers, from one generator that is set to the key of each batch.

    Args:
        seed: of the run.
        stream: see ``generator``.

    Example:
        >>> Stream(0, stream=1).at(7).random() == generator(0, count=7, stream=1).random()
        True
    """

    def __init__(self, seed: int | None, stream: int) -> None:
        self._bits = np.random.Philox(key=seed, counter=[0, 0, stream, 0])
        self._start: Any = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, count: int) -> np.random.Generator:
        """Return the generator, at the start of a batch. It is the same object each time."""
        self._start["state"]["counter"][3] = count
        self._bits.state = self._start
        return self._generator


def global_seed() -> int:
    """Return the seed of ``seed_everything``, or a fresh one that takes nothing from the global generators."""
    return int(os.environ.get("PL_GLOBAL_SEED", secrets.randbits(32)))
