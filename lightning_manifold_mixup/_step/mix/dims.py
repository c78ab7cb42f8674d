"""Which dimension of a hidden state counts the samples: one rule, for observing, for mixing, and for plain loops."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_manifold_mixup._step.labels.targets import MixingError


def sample_dim(shape: Sequence[int], n: int, batch_dim: int | None = None, rows: Collection[int] = ()) -> int | None:
    """Return the dimension of a tensor that counts the samples; None if none does, or if it is not clear.

    It is dimension 0, if that has the size n. Dimension 1 is taken for time-major sequences, (time, n, ...), but not

    - in tensors with two dimensions: rows of something else (nodes, points, tokens) may have n features;
    - where dimension 0 is a multiple of n: it may hold several views of each sample;
    - where dimension 0 has the size of such rows in the batch.

    Args:
        shape: the shape of the tensor.
        n: the number of samples.
        batch_dim: the dimension, if the user has said so.
        rows: sizes that are known to count something else: the first sizes of inputs without a dimension of size n.

    Example:
        >>> sample_dim((4, 7, 9), n=4), sample_dim((7, 4, 9), n=4), sample_dim((7, 4), n=4), sample_dim((8, 4, 9), n=4)
        (0, 1, None, None)
        >>> sample_dim((7, 4), n=4, batch_dim=1)
        1
    """
    if batch_dim is not None:
        return batch_dim if -len(shape) <= batch_dim < len(shape) and shape[batch_dim] == n else None
    if not shape or shape[0] == n:
        return 0 if shape else None
    views = n > 1 and shape[0] % n == 0
    return 1 if len(shape) > 2 and shape[1] == n and not views and shape[0] not in rows else None


def sample_dims(
    shapes: Sequence[Sequence[int]],
    n: int,
    batch_dim: int | None = None,
    module: nn.Module | None = None,
    rows: Collection[int] = (),
) -> tuple[int | None, ...]:
    """Return the same for each tensor that a layer returns.

    A recurrent layer of PyTorch has ``batch_first``, and its last states always have the samples in dimension 1.

    Args:
        shapes: the shapes of the floating point tensors, in the order of the structure.
        n: the number of samples.
        batch_dim: the dimension, if the user has said so.
        module: the layer.
        rows: see ``sample_dim``.

    Example:
        >>> sample_dims([(4, 4, 9), (1, 4, 9), (1, 4, 9)], n=4, module=nn.LSTM(5, 9, batch_first=True))
        (0, 1, 1)
    """
    if isinstance(module, nn.RNNBase) and all(len(shape) == 3 for shape in shapes):
        given = [0 if module.batch_first else 1, *[1] * (len(shapes) - 1)]
        return tuple(sample_dim(shape, n, dim) for shape, dim in zip(shapes, given, strict=True))
    return tuple(sample_dim(shape, n, batch_dim, rows) for shape in shapes)


def batch_dims(h: Any, n: int, batch_dim: int | None = None) -> list[int]:
    """Find the dimension of the samples in each floating point tensor of ``h``; ``sample_dim`` has the rule.

    Args:
        h: a hidden state; see ``Mix.__call__``.
        n: number of samples.
        batch_dim: None takes dimension 0, or dimension 1 of a tensor with three dimensions or more where dimension 0
            has another size (sequences of time-major networks, the states of an LSTM).

    Raises:
        MixingError: if a tensor has no such dimension. Several views of the batch in one tensor, 2n samples in
            dimension 0, are not taken for a time-major sequence.

    Example:
        >>> import torch
        >>> batch_dims((torch.zeros(4, 9), torch.zeros(7, 4, 9)), n=4)
        [0, 1]
    """
    dims: list[int] = []

    def find(tensor: Tensor) -> None:
        if not is_state(tensor):
            return
        dim = sample_dim(tensor.shape, n, batch_dim)
        if dim is None:
            where = "in dimension 0 or 1" if batch_dim is None else f"in dimension {batch_dim} (`batch_dim`)"
            raise MixingError(wrong_shape(tensor, n, where))
        dims.append(dim)

    if isinstance(h, Tensor):
        find(h)
    else:
        apply_to_collection(h, Tensor, find)
    if not dims:
        what = f"a {h.dtype} tensor of shape {tuple(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise MixingError(f"Expected a hidden state with floating point tensors to mix, got {what}.")
    return dims


def is_state(tensor: Tensor) -> bool:
    """Whether a tensor of a hidden state can be mixed: a floating point one with a dimension."""
    return tensor.is_floating_point() and tensor.ndim > 0


def wrong_shape(tensor: Tensor, n: int, where: str) -> str:
    """Say that no dimension of a state counts its n samples, and what to do."""
    return (
        f"Expected a state of {n} samples {where}, got shape {tuple(tensor.shape)}. Mix where the whole batch passes "
        "once, or set `batch_dim` to the dimension that counts the samples."
    )
