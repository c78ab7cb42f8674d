"""Random numbers for draws: private, so that the global generators stay untouched, and without a state to save."""

from __future__ import annotations

import os
import secrets

import numpy as np


def generator(seed: int | None, count: int, stream: int) -> np.random.Generator:
    """Random numbers that are a function of their key alone: no state to carry, save or restore.

    Args:
        seed: of the run.
        count: of the batch, so that a resumed run draws what the uninterrupted one would have.
        stream: 0 for draws that all processes share, 1 + rank for those of one process.

    Example:
        >>> generator(0, count=7, stream=0).random() == generator(0, count=7, stream=0).random()
        True
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, stream, count]))


def global_seed() -> int:
    """The seed of ``seed_everything``, or a fresh one that takes nothing from the global generators."""
    return int(os.environ.get("PL_GLOBAL_SEED", secrets.randbits(32)))
