"""Class-balanced splits: pure functions of (labels, sizes, generator)."""

import torch
from torch import Tensor

__all__ = ["draw_per_class", "split_by_class"]


def split_by_class(labels: Tensor, size: int | float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split a data set in two so that each class keeps its share in both.

    Args:
        labels: (n,) integers.
        size: samples in the second part: a number of them, or a share of all (a float below 1). Class counts that are
            not whole are rounded so that they sum to it (largest remainders).
        generator: where the draws come from.

    Returns:
        Indices (sorted, int64) of the first and of the second part.

    Raises:
        ValueError: if ``size`` is negative or leaves nothing for the first part.

    Example:
        >>> first, second = split_by_class(torch.arange(20) % 2, 0.5, torch.Generator().manual_seed(0))
        >>> len(first), (second % 2).sum().item()
        (10, 5)
    """
    n = len(labels)
    share = isinstance(size, float) and size < 1
    wanted = round(size * n) if share else int(size)
    if size < 0 or wanted != (wanted if share else size) or (wanted >= n and n > 0):
        raise ValueError(
            f"split: expected a number of samples from 0 to {n - 1} or a share from 0 to below 1, got {size!r}."
        )
    classes, counts = torch.unique(labels, return_counts=True)
    exact = counts.double() * wanted / max(n, 1)
    taken = exact.floor().long()
    missing = wanted - int(taken.sum())
    taken[(exact - taken).argsort(descending=True, stable=True)[:missing]] += 1
    order = [_shuffled(labels, label, generator) for label in classes]
    second = [indices[:count] for indices, count in zip(order, taken.tolist(), strict=True)]
    first = [indices[count:] for indices, count in zip(order, taken.tolist(), strict=True)]
    empty = torch.empty(0, dtype=torch.long)
    return torch.cat([empty, *first]).sort().values, torch.cat([empty, *second]).sort().values


def draw_per_class(labels: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw the same number of samples of each class.

    A smaller draw from a generator in the same state is a subset of a larger one.

    Args:
        labels: (n,) integers.
        number: samples of each class.
        generator: where the draws come from.

    Returns:
        Indices (sorted, int64), ``number`` for each class that occurs in ``labels``.

    Raises:
        ValueError: if ``number`` is not positive or a class has fewer samples; the message names the class.

    Example:
        >>> labels = torch.arange(20) % 2
        >>> labels[draw_per_class(labels, 3, torch.Generator().manual_seed(0))].bincount()
        tensor([3, 3])
    """
    classes, counts = torch.unique(labels, return_counts=True)
    if number < 1:
        raise ValueError(f"labels_per_class: expected at least 1, got {number}.")
    if len(classes) and int(counts.min()) < number:
        short = int(counts.argmin())
        raise ValueError(
            f"labels_per_class: expected at most {int(counts[short])}, the training samples of class "
            f"{int(classes[short])}, got {number}."
        )
    drawn = [_shuffled(labels, label, generator)[:number] for label in classes]
    return torch.cat([torch.empty(0, dtype=torch.long), *drawn]).sort().values


def _shuffled(labels: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    indices = (labels == label).nonzero().flatten()
    return indices[torch.randperm(len(indices), generator=generator)]
