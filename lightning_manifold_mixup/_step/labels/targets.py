"""Labels in superposition: a target that is two labellings at once until a loss has been taken.

Manifold Mixup takes the loss against ``lam * y + (1 - lam) * y[partners]`` (section 2, step 4). For class indices that
sum is taken where it is exact for every loss, at the loss itself: ``lam * L(y) + (1 - lam) * L(y[partners])``. A
``MixedTarget`` is therefore a tensor with two *labellings*, those of the samples and those of their partners. The
one with the larger weight is called the *dominant* one. Whatever is computed from a MixedTarget is computed for both
labellings, and so is all that follows from it; nothing is averaged before the value leaves the training step. That
keeps class weights, ``ignore_index``, focal terms, masks and products of label-dependent terms exact alike.

``operations.py`` has the rules by which torch functions are evaluated. What they cannot follow (numpy, writes into
other tensors, Python code that branches on labels) raises ``MixingError``, or is found by ``self_check.py``; the
training step then runs once for each labelling instead (``step.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import Self, override

from lightning_manifold_mixup._step.devices import float64, sent

Reader = Callable[[str, Any, Any, Any], Any]
_WIDE = (torch.float32, torch.float64)


class MixingError(RuntimeError):
    """Manifold Mixup could not do what it promised for this batch."""


class SuperpositionError(MixingError):
    """Labels in superposition cannot go on; the training step can still run once for each labelling."""


# What to do where each sample has a lam of its own.
SAMPLES = (
    "let a function return the loss of each sample (`reduction='none'`), and take the mean of `mixed_loss(function, "
    "logits, y)`"
)


class Superposition:
    """What all values that descend from one draw share.

    Attributes:
        lam: weight of the original labelling; 0-d, or (n,) if each sample has a lam of its own.
        number: lam, where the host knows it.
        swapped: whether the dominant labels are those of the partners; a bool tensor where only the device knows.
        used: whether a value with a gradient has come out of it, that is, whether a loss has seen the labels.
        holds_labels: whether any labels have been put into it.
        inspected: whether the code knows of the superposition: it has asked for one of the labellings.
        open: until ``end``.
        reader: decides what Python code gets that reads a value on the host; None gives the value shown.
        forgiving: whether the step goes on with the dominant labels alone where superposition cannot go on.
        failure: why it did so.
        summed: whether it is of losses whose samples have a lam each, and were summed up by it.
        read_late: whether code that runs in the backward pass has read it, when it was not open any more.
    """

    used = holds_labels = inspected = forgiving = summed = read_late = False
    open = True
    reader: Reader | None = None
    failure: SuperpositionError | None = None
    _reduced: Superposition | None = None

    def __init__(self, lam: Tensor, number: float | None = None) -> None:
        self.lam = lam
        self.number = number
        # The host knows lam without asking a device wherever it was drawn.
        if number is None and lam.device.type == "cpu" and lam.ndim == 0:
            number = float(lam)
        self.swapped: bool | Tensor = lam < 0.5 if number is None else number < 0.5
        self._alive: list[weakref.ref[Tensor]] = []

    def to(self, device: torch.device) -> Self:
        """Return the same, with lam on the device; the copy does not wait for the device."""
        if self.lam.device != device and device.type != "cpu":
            self.lam = sent(self.lam, device)
            self.swapped = sent(self.swapped, device) if isinstance(self.swapped, Tensor) else self.swapped
        return self

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """Of the dominant labelling and of the other."""
        if self.number is not None and not torch.compiler.is_compiling():  # a graph must not hold one batch's lam
            other = 1 - self.number
            return (other, self.number) if self.swapped else (self.number, other)
        lam = self.lam.to(dtype)
        return self.ordered(lam, 1 - lam)

    @property
    def reduced(self) -> Superposition:
        """For losses of samples that have been summed up with weights of their own: one weight, the mean."""
        if self._reduced is None:
            self._reduced = Superposition(float64(self.lam).mean())
            self._reduced.swapped, self._reduced.summed = False, True
        return self._reduced

    def ordered(self, labels: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
        """Return the dominant labels and the others."""
        if isinstance(self.swapped, bool):
            return (partners, labels) if self.swapped else (labels, partners)
        swapped = self.swapped.reshape(self.swapped.shape + (1,) * (labels.ndim - self.swapped.ndim))
        return torch.where(swapped, partners, labels), torch.where(swapped, labels, partners)

    def superpose(self, labels: Tensor, partners: Tensor) -> Superposed:
        """Two labellings as one tensor, of the same dtype."""
        self.holds_labels = True
        return self.hold(*self.ordered(labels, partners), steady=True, averaged=False)  # type: ignore[no-any-return]

    def hold(self, first: Tensor, second: Tensor, *, steady: bool, averaged: bool, tensor: Any = None) -> Any:
        """Hold a value under both labellings in a new tensor, or in a plain one that labels are written into."""
        dtype, apart = first.dtype, tensor is not None
        kind = KINDS[dtype.is_floating_point or dtype.is_complex]
        if apart:
            tensor.__class__ = kind
        elif first.requires_grad or torch.compiler.is_compiling():
            tensor = first.as_subclass(kind)
        else:  # no view: who keeps it may write into it after the batch
            tensor = Tensor._make_subclass(kind, first)
        tensor.first, tensor.second, tensor.superposition = first, second, self
        tensor.steady, tensor.averaged, tensor.apart = steady, averaged, apart
        if not torch.compiler.is_compiling():
            self._alive.append(weakref.ref(tensor))
        return tensor

    def mean(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mixed value, computed in the wider of their dtype and the weight's, returned in theirs."""
        number = self.number
        wide = first.dtype == second.dtype and first.dtype in _WIDE
        if number is not None and wide and not torch.compiler.is_compiling():
            # One operation in place of three, forward and backward.
            return torch.lerp(second, first, 1 - number if self.swapped else number)
        lam = self.lam
        if lam.ndim and first.shape[:1] != lam.shape:
            raise MixingError(
                f"lam has one value for each of {len(lam)} samples, but the loss has shape {tuple(first.shape)}: its "
                "samples have been summed up without their lam. Use cross entropy, NLL or BCE from torch.nn.functional "
                f"with their own reduction, which takes care of it; {SAMPLES}; or draw one lam for the batch."
            )
        dtype = torch.promote_types(first.dtype, torch.float32)
        one, other = self.weights(dtype)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and lam.ndim:
            shape = lam.shape + (1,) * (first.ndim - 1)
            one, other = one.reshape(shape), other.reshape(shape)
        if dtype == first.dtype == second.dtype:
            return one * first + other * second
        return (one * first.to(dtype) + other * second.to(dtype)).to(first.dtype)

    def give_up(self, error: SuperpositionError) -> None:
        """End the superposition within the step: what was in it is plain and of the dominant labels.

        Raises:
            SuperpositionError: ``error``, unless the superposition is forgiving.
        """
        if not self.forgiving:
            raise error
        self.failure = error
        self.close(dominant=True)

    def end(self) -> None:
        """End the superposition, since the loss has been taken: its tensors have the value shown from now on."""
        self.open = False
        if self._reduced is not None:
            self._reduced.open = False

    def close(self, *, dominant: bool = False) -> None:
        """Make ordinary tensors of those that somebody has kept.

        They hold the value shown; what was there before, and was written into, holds the dominant value, as after one
        ordinary step.

        Args:
            dominant: all hold the dominant value.
        """
        self.end()
        for reference in self._alive:
            if (tensor := reference()) is not None:
                shown = None
                if tensor.averaged and not tensor.apart and not dominant:  # type: ignore[attr-defined]
                    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
                        shown = shown_value(tensor).detach()
                tensor.__class__ = Tensor
                if shown is not None:
                    tensor.data = shown
                for name in Superposed.__annotations__:
                    delattr(tensor, name)
        self._alive.clear()


KINDS: dict[bool, type[Superposed]] = {}
"""The kinds of values in superposition, by whether they are floating point. ``mixed_target.py`` puts them here."""


class Superposed(Tensor):
    """A value under two labellings. As a tensor it is the dominant one. ``mixed_target.py`` has the kinds of it."""

    first: Tensor  # of the dominant labelling
    second: Tensor
    superposition: Superposition
    steady: bool  # comes from labels alone: what is the same under both labellings now will always be
    averaged: bool  # code that does not know the superposition is shown the mixed value, not the dominant one
    apart: bool  # its memory is not that of its first part: it is written into as well

    @property
    def labels(self) -> Tensor:
        """The value under the original labelling, weight lam."""
        return self._inspected()[0]

    @property
    def partners(self) -> Tensor:
        """The value under the partners' labelling, weight 1 - lam."""
        return self._inspected()[1]

    def _inspected(self) -> tuple[Tensor, Tensor]:
        self.superposition.inspected = True
        return self.superposition.ordered(self.first, self.second)

    @property
    def lam(self) -> Tensor:
        """Weight of the original labelling, a 0-d or (n,) tensor."""
        return self.superposition.lam

    @property
    def shown(self) -> Tensor:
        """The plain tensor that code without knowledge of the superposition sees."""
        with torch._C.DisableTorchFunctionSubclass():
            return shown_value(self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if not hasattr(self, "first"):
            return super().__repr__()  # type: ignore[no-untyped-call,no-any-return]
        labels, partners = self.superposition.ordered(self.first, self.second)  # to print them is not to use them
        return f"{type(self).__name__}(labels={labels!r}, partners={partners!r}, lam={self.lam!r})"

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:  # what leaves the process is plain
        return self.shown.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone() if self.superposition.open else self.shown.detach().clone()


def plain(tree: Any) -> Any:
    """Return the structure with plain tensors: of losses the mixed value, of labels and metrics the dominant one."""
    if type(tree) is Tensor:
        return tree
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(tree, Tensor):
            return shown_value(tree)
        return apply_to_collection(tree, Superposed, shown_value, allow_frozen=True)


def shown_value(value: Tensor) -> Tensor:
    if not isinstance(value, Superposed) or not hasattr(value, "first"):
        return value
    if value.averaged and value.first.shape == value.second.shape:
        return value.superposition.mean(value.first, value.second)
    return value.first


def superpositions(tree: Any) -> list[Superposition]:
    """Return the open superpositions of the tensors anywhere in a structure, one for each draw."""
    found: dict[int, Superposition] = {}

    def note(tensor: Superposed) -> None:
        if tensor.superposition.open:
            found[id(tensor.superposition)] = tensor.superposition

    apply_to_collection(tree, Superposed, note)
    return list(found.values())


def labellings(tree: Any) -> tuple[Any, Any]:
    """Return a structure under each labelling, the dominant one first, as plain tensors."""

    def first(value: Superposed) -> Tensor:
        return value.first

    def second(value: Superposed) -> Tensor:
        return value.second if value.superposition.open else value.first

    return apply_to_collection(tree, Superposed, first), apply_to_collection(tree, Superposed, second)
