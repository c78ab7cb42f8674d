"""What a draw is made from: the batch, alpha, S and private random numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_manifold_mixup._step.arguments import check_number
from lightning_manifold_mixup._step.batch.places import Places
from lightning_manifold_mixup._step.mix.randomness import Stream
from lightning_manifold_mixup.mixing import Draw, Mix, draw_mix
from lightning_manifold_mixup.partners import Partners

# How many batches are drawn for at a time, up to how many samples, and how many uniform numbers for each: whether the
# batch is mixed, and k.
_AHEAD = 32
_MANY = 1024
_UNIFORMS = 2


@dataclass(frozen=True)
class AlphaSchedule:
    """An alpha that moves linearly from ``start`` to ``end`` over the first ``epochs`` epochs, and stays there.

    Args:
        start: alpha of the first epoch, >= 0; while it is 0, nothing is mixed.
        end: alpha from epoch ``epochs`` on, >= 0.
        epochs: length of the ramp, in epochs, >= 1.

    Raises:
        ValueError: for other values, at construction.

    Example:
        >>> schedule = AlphaSchedule(start=0.0, end=2.0, epochs=4)
        >>> [schedule(epoch) for epoch in range(6)]
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    """

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("end", self.end)
        check_number("epochs", self.epochs, least=1.0)

    def __call__(self, epoch: int) -> float:
        """Return alpha in an epoch, counted from 0."""
        return self.start + (self.end - self.start) * min(epoch / self.epochs, 1.0)


Alpha = float | Sequence[float]


class Draws:
    """The random numbers of a run, batch by batch: those that all processes share, and those of this one.

    Whatever asks for them, a batch has the same ones. The first of them are drawn for many batches at a time, since a
    loop takes a fraction of the time that single calls between training steps take.

    Args:
        seed: of the run.
        rank: of this process.

    Example:
        >>> draws, others = Draws(0, rank=0), Draws(0, rank=0)
        >>> draws.start(7), others.start(7)
        (None, None)
        >>> draws.uniform() == others.shared.random(), draws.mix(4, 2.0).lam == draw_mix(4, 2.0, others.own).lam
        (True, tensor(True))
    """

    def __init__(self, seed: int | None, rank: int) -> None:
        self._streams = Stream(seed, 0), Stream(seed, 1 + rank)
        self._uniforms: dict[int, list[float]] = {}  # by batch
        self._mixes: dict[int, Mix] = {}
        self._how: tuple[Any, ...] = ()  # these were drawn
        self.start(0)

    def start(self, count: int) -> None:
        """Begin with the numbers of a batch, by its number."""
        self._count = count
        self._shared: np.random.Generator | None = None
        self._own: np.random.Generator | None = None
        self._taken = 0  # of the uniform numbers
        self._mixed = False

    @property
    def shared(self) -> np.random.Generator:
        """Goes on after what has been taken of the shared numbers of the batch."""
        if self._shared is None:
            self._shared = self._streams[0].at(self._count)
            self._shared.random(self._taken)
        return self._shared

    @property
    def own(self) -> np.random.Generator:
        """Goes on after what has been taken of this process's numbers of the batch."""
        if self._own is None:
            self._own = self._streams[1].at(self._count)
            if self._mixed:
                n, alpha, dominant = self._how
                draw_mix(n, alpha, self._own, dominant)
        return self._own

    def uniform(self) -> float:
        """Return a shared number in [0, 1)."""
        if self._shared is not None or self._taken == _UNIFORMS:
            return float(self.shared.random())
        if self._count not in self._uniforms:
            stream, counts = self._streams[0], range(self._count, self._count + _AHEAD)
            self._uniforms = {count: stream.at(count).random(_UNIFORMS).tolist() for count in counts}
        self._taken += 1
        return self._uniforms[self._count][self._taken - 1]

    def mix(self, n: int, alpha: Alpha, *, dominant: bool = False) -> Mix:
        """Compute ``draw_mix`` of this process's numbers."""
        if self._own is not None or self._mixed:
            return draw_mix(n, alpha, self.own, dominant)
        how = n, alpha, dominant
        if how != self._how or self._count not in self._mixes:
            ahead = _AHEAD if how == self._how and n <= _MANY else 1  # batches of one size follow each other
            stream, counts = self._streams[1], range(self._count, self._count + ahead)
            self._mixes = {count: draw_mix(n, alpha, stream.at(count), dominant) for count in counts}
            self._how = how
        self._mixed = True
        return self._mixes[self._count]


@dataclass
class DrawContext:
    """All that a draw may depend on; what ``ManifoldMixupCallback.draw`` is handed.

    Attributes:
        n: number of samples in the batch.
        targets: the plain targets of these samples: a tensor, or a list of them if there are several.
        batch: the whole plain batch.
        layers: S, with the weight of each layer.
        alpha: of this epoch: a number, or a pair (a, b) for Beta(a, b).
        epoch: counted from 0.
        draws: the random numbers of the batch.
        partners: the strategy that chooses partners; None is a uniform permutation.
        dominant: whether lam is folded to at least 1/2.
        rows: which samples are trained on, (n,) bool; None if all are. The others are their own partners.

    Example:
        >>> context = DrawContext(4, None, None, layers={"input": 1.0}, alpha=2.0, epoch=0, draws=Draws(0, rank=0))
        >>> context.draw_layer(), sorted(context.draw_mix().partners.tolist())
        ('input', [0, 1, 2, 3])
    """

    n: int
    targets: Any
    batch: Any
    layers: Mapping[str, float]
    alpha: Alpha
    epoch: int
    draws: Draws
    partners: Partners | None = None
    dominant: bool = False
    rows: Tensor | None = None

    @property
    def shared(self) -> np.random.Generator:
        """Random numbers that are equal on all ranks; k comes from them."""
        return self.draws.shared

    @property
    def own(self) -> np.random.Generator:
        """Random numbers of this rank; lam and the partners come from them."""
        return self.draws.own

    def draw_layer(self) -> str:
        """Draw k from S by the layers' weights; the same on all ranks."""
        names, weights = list(self.layers), list(accumulate(self.layers.values()))
        return names[bisect_right(weights, self.draws.uniform() * weights[-1])]

    def draw_mix(self) -> Mix:
        """Draw lam ~ Beta(alpha, alpha), and a partner for each sample."""
        if self.partners is None and self.rows is None:
            return self.draws.mix(self.n, self.alpha, dominant=self.dominant)
        return draw_mix(self.n, self.alpha, self.own, dominant=self.dominant, partners=self.draw_partners())

    def draw_partners(self) -> Tensor | None:
        """Return the strategy's partners, among the samples that are trained on; None is a permutation of all."""
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
        """Draw layer and mix, as in the paper."""
        return Draw(self.draw_layer(), self.draw_mix())


def contexts_of(
    batch: Any,
    places: Places,
    layers: Mapping[str, float],
    alpha: Alpha,
    epoch: int,
    draws: Draws,
    *,
    partners: Partners | None = None,
    dominant: bool = False,
) -> list[DrawContext]:
    """Return a context for each group of samples in a batch."""
    how, contexts = (layers, alpha, epoch, draws, partners, dominant, places.rows_of(batch)), []
    for number, group in enumerate(places.groups):
        targets = [places.of(batch, key) for key in group.targets]
        shown = targets[0] if len(targets) == 1 else targets
        contexts.append(DrawContext(places.samples(batch, number), shown, batch, *how))
    return contexts


def check_draw(draw: Any, layers: Mapping[str, float], n: int) -> None:
    """Refuse what a user's ``draw`` has returned if it is no draw of a batch of n samples at one of ``layers``."""
    if not isinstance(draw, Draw):
        raise TypeError(f"Expected `draw` to return `Draw(layer, mix)`, got {type(draw).__name__}: {draw!r:.80}.")
    if draw.layer not in layers or draw.mix.partners.shape[0] != n:
        raise ValueError(
            f"Expected `draw` to give one of S = {list(layers)} and {n} partners, got layer {draw.layer!r} and "
            f"{len(draw.mix.partners)} partners."
        )


def cycle(n: int, generator: np.random.Generator, rows: Tensor | None) -> Any:
    """Draw a permutation in which no sample is its own partner, among the samples that are trained on."""
    order = generator.permutation(n if rows is None else rows.nonzero().flatten().cpu().numpy())
    partners = np.arange(n)
    partners[order] = np.roll(order, -1)
    return partners
