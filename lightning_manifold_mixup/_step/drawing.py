"""What a draw has at hand: the batch, alpha, S and private random numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_manifold_mixup.mixing import Draw, Mix, check_alpha, draw_mix
from lightning_manifold_mixup.partners import Partners


@dataclass(frozen=True)
class AlphaSchedule:
    """An alpha that moves linearly from ``start`` to ``end`` over the first ``epochs`` epochs, and stays there.

    Args:
        start: alpha of the first epoch, >= 0; while it is 0, nothing is mixed.
        end: alpha from epoch ``epochs`` on, >= 0.
        epochs: length of the ramp, in epochs, >= 1.

    Example:
        >>> schedule = AlphaSchedule(start=0.0, end=2.0, epochs=4)
        >>> [schedule(epoch) for epoch in range(6)]
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    """

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        check_alpha(self.start)
        check_alpha(self.end)
        if self.epochs < 1:
            raise ValueError(f"Expected a schedule of at least one epoch, got epochs={self.epochs}.")

    def __call__(self, epoch: int) -> float:
        """Alpha in an epoch, counted from 0."""
        return self.start + (self.end - self.start) * min(epoch / self.epochs, 1.0)


Alpha = float | Sequence[float]


@dataclass(frozen=True)
class DrawContext:
    """All that a draw may depend on; what :meth:`ManifoldMixupCallback.draw` is handed.

    Attributes:
        n: number of samples in the batch.
        targets: the plain targets: a tensor, or a list of them if there are several.
        batch: the whole plain batch.
        layers: S, with the weight of each layer.
        alpha: of this epoch: a number, or a pair (a, b) for Beta(a, b).
        epoch: counted from 0.
        shared: random numbers that are equal on all ranks; k comes from them.
        own: random numbers of this rank; lam and the partners come from them.
        partners: the strategy that chooses partners; None is a uniform permutation.
        dominant: whether lam is folded to at least 1/2.
        rows: which samples are trained on, (n,) bool; None if all are. The others are their own partners.
    """

    n: int
    targets: Any
    batch: Any
    layers: Mapping[str, float]
    alpha: Alpha
    epoch: int
    shared: np.random.Generator
    own: np.random.Generator
    partners: Partners | None = None
    dominant: bool = False
    rows: Tensor | None = None

    def draw_layer(self) -> str:
        """k, drawn from S by the layers' weights; the same on all ranks."""
        names, weights = list(self.layers), list(accumulate(self.layers.values()))
        return names[bisect_right(weights, self.shared.random() * weights[-1])]

    def draw_mix(self) -> Mix:
        """Lam ~ Beta(alpha, alpha), and a partner for each sample."""
        return draw_mix(self.n, self.alpha, self.own, dominant=self.dominant, partners=self.draw_partners())

    def draw_partners(self) -> Tensor | None:
        """The strategy's partners, among the samples that are trained on; None is a permutation of all."""
        if self.rows is None:
            return None if self.partners is None else self._chosen(self.targets, self.n)
        rows = self.rows.nonzero().flatten().cpu()
        partners = torch.arange(self.n)
        if self.partners is None:
            chosen = torch.from_numpy(self.own.permutation(len(rows)))
        else:
            chosen = self._chosen(self.targets[self.rows], len(rows))
        partners[rows] = rows[chosen]
        return partners

    def _chosen(self, targets: Any, n: int) -> Tensor:
        assert self.partners is not None
        chosen = self.partners(targets, n, self.own)
        if not isinstance(chosen, Tensor):  # None would be a permutation
            raise TypeError(
                f"Expected partners as an (n,) int64 tensor from {self.partners!r}, got {type(chosen).__name__}: "
                f"{chosen!r:.60}. `torch.from_numpy` makes one of a NumPy array."
            )
        return chosen

    def draw(self) -> Draw:
        """Both, as the paper has it."""
        return Draw(self.draw_layer(), self.draw_mix())
