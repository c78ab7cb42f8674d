"""Tables of results, and means with their standard deviations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_manifold_mixup._tables import Row, console, number, print_table

__all__ = ["Row", "console", "decimals_of", "mean_and_std", "plus_minus", "print_table"]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Average a number over several runs.

    Args:
        values: the number in each run.

    Returns:
        The mean, and the standard deviation of the sample (n - 1), which is None for a single run.

    Example:
        >>> mean_and_std([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def decimals_of(name: str) -> int:
    """Return how many decimals a number is shown with: two for percentages, else three.

    Args:
        name: of what was measured, with a % if it is a percentage.

    Example:
        >>> decimals_of("error %"), decimals_of("NLL")
        (2, 3)
    """
    return 2 if "%" in name else 3


def plus_minus(mean: float | None, deviation: float | None, decimals: int = 3) -> str:
    """Write a mean and its standard deviation, or the mean alone where there is no deviation.

    Args:
        mean: None gives an empty text.
        deviation: the standard deviation.
        decimals: of both numbers.

    Example:
        >>> plus_minus(0.5, 0.25, 2), plus_minus(0.5, None)
        ('0.50 ± 0.25', '0.500')
    """
    if mean is None:
        return ""
    return number(mean, decimals) + ("" if deviation is None else f" ± {number(deviation, decimals)}")
