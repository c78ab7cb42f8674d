"""Which dimension of a hidden state counts the samples: one rule, for observing, for mixing, and for plain loops."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn


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
