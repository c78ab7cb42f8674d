"""Checks that lam and partners are a draw, where that does not wait for a device; and that a target can be mixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_mix(lam: Any, partners: Any) -> bool:
    """Refuse what is no ``Mix``, and tell whether ``partners`` is known to be a permutation."""
    for name, value, dtypes, remedy in (
        ("lam", lam, (torch.float32, torch.float64), "`torch.tensor(lam)`, `lam.float()`"),
        ("partners", partners, (torch.int64,), "`torch.tensor(partners)`, `partners.long()`"),
    ):
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            got = f"one of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}: {value!r:.60}"
            raise TypeError(f"Expected {name} to be a tensor of {' or '.join(map(str, dtypes))} ({remedy}), got {got}.")
    if partners.ndim != 1:
        raise ValueError(f"Expected partners of shape (n,), the partner of each sample, got {tuple(partners.shape)}.")
    n = len(partners)
    if lam.ndim and lam.shape != (n,):
        raise ValueError(
            f"Expected one lam, a 0-d tensor, or one for each of the {n} samples that have partners, shape ({n},), got "
            f"shape {tuple(lam.shape)}."
        )
    if lam.requires_grad:
        raise ValueError("Expected a lam that is drawn, got one that requires a gradient, which mixing does not give.")
    if torch.compiler.is_compiling():
        return False
    # NumPy takes a fraction of the time of PyTorch on so few numbers.
    if (weights := _on_host(lam)) is not None and n and not (weights.min() >= 0 and weights.max() <= 1):
        raise ValueError(f"Expected lam in [0, 1], the weight of the original sample, got {weights.tolist()}.")
    if (indices := _on_host(partners)) is None:
        return False
    if n and not (indices.min() >= 0 and indices.max() < n):
        raise ValueError(f"Expected partners in 0..{n - 1}, indices into the batch of {n}, got {indices.tolist()}.")
    return n == 0 or bool(np.bincount(indices, minlength=n).max() == 1)


def check_target(target: Tensor, n: int, dim: int = 0) -> None:
    """Refuse a target that cannot be mixed.

    Args:
        target: a tensor of the batch.
        n: the number of samples.
        dim: the dimension that counts them.

    Raises:
        ValueError: if it does not hold n samples.
        TypeError: for float16, complex and sparse targets.

    Example:
        >>> check_target(torch.zeros(4, dtype=torch.float16), n=4)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        TypeError: A target of dtype torch.float16 cannot be mixed: class indices are integer (`y.long()`), and soft ...
    """
    if target.ndim <= dim or target.shape[dim] != n:
        raise ValueError(
            f"Expected a target of {n} samples in dimension {dim}, as the batch has, got shape {tuple(target.shape)}."
        )
    if target.layout != torch.strided:
        raise TypeError(f"A sparse target ({target.layout}) cannot be mixed: hand it on as `y.to_dense()`.")
    dtype = target.dtype
    if dtype == torch.float16 or dtype.is_complex:
        raise TypeError(
            f"A target of dtype {dtype} cannot be mixed: class indices are integer (`y.long()`), and soft or "
            "continuous labels need the precision of bfloat16, float32 or float64 (`y.float()`)."
        )


def number_of(lam: Tensor) -> float | None:
    if lam.ndim or torch.compiler.is_compiling() or (value := _on_host(lam)) is None:
        return None
    return float(value)


def _on_host(tensor: Tensor) -> Any:
    """Return the values as a NumPy array, None where reading them would wait for a device, or where there are none."""
    return tensor.numpy() if type(tensor) is Tensor and tensor.device.type == "cpu" else None
