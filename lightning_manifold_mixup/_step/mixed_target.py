"""The tensors that stand for two labellings; ``targets.py`` says what that means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self, override

from lightning_manifold_mixup._step.operations import evaluate, plain_cross_entropy
from lightning_manifold_mixup._step.targets import KINDS, Superposed, Superposition


class _Evaluated(Superposed):
    """On which torch functions are evaluated once for each labelling."""

    @classmethod
    @override
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plain_way = func is F.cross_entropy and len(args) == 2
        if plain_way and (losses := plain_cross_entropy(*args, **kwargs)) is not None:
            return losses
        with torch._C.DisableTorchFunctionSubclass():
            return evaluate(func, args, kwargs)


class MixedTarget(_Evaluated):
    """Integer or boolean labels in superposition: ``y`` with weight lam and ``y[partners]`` with weight 1 - lam.

    To code that does not know it, it is the plain tensor of the dominant labels (``y`` if lam >= 1/2, else
    ``y[partners]``), of the same shape, dtype and device. Casts, moves, views and indexing keep it; any loss computed
    from it by torch operations is ``lam * loss(y) + (1 - lam) * loss(y[partners])`` (section 2, step 4).

    Args:
        labels: the original labels, integer or bool.
        partners: the labels of the partners, same shape and dtype.
        lam: weight of ``labels``, a 0-d float tensor, or (n,) with one weight for each sample.

    Raises:
        TypeError: for labels that are not integer or bool. A float target is mixed as any other tensor: ``mix(y)``.

    Example:
        >>> import torch.nn.functional as F
        >>> y = MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor(0.75))
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> expected = 0.75 * F.cross_entropy(logits, y.labels) + 0.25 * F.cross_entropy(logits, y.partners)
        >>> torch.testing.assert_close(F.cross_entropy(logits, y).item(), expected.item())
        >>> y.shown
        tensor([0, 1])
    """

    def __new__(cls, labels: Tensor, partners: Tensor, lam: Tensor) -> Self:
        """Put the two labellings into superposition."""
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"MixedTarget holds class indices, integer or bool; got {labels.dtype}. A float target needs no "
                "superposition: use the mixed tensor, `mix(y)`."
            )
        # A copy: what user code writes into its labels must not reach the batch it was made from.
        new = Superposition(lam).to(labels.device).superpose(labels.detach().clone(), partners.detach())
        assert isinstance(new, cls)
        return new


class MixedValue(_Evaluated):
    """A floating point value that depends on a ``MixedTarget``: a loss, a weight looked up by label, a soft mask.

    It holds the value under each labelling, so that what is computed from it stays exact. ``backward()``, ``item()``
    and loggers see the mixed value ``lam * value(y) + (1 - lam) * value(y[partners])`` of a loss.
    """


KINDS.update({False: MixedTarget, True: MixedValue})
