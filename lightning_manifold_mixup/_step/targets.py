"""Labels in superposition: a target that is two labellings at once until a loss has been taken.

Manifold Mixup takes the loss against ``lam * y + (1 - lam) * y[partners]`` (section 2, step 4). For class indices
that sum is taken where it is exact for every loss, at the loss itself: ``lam * L(y) + (1 - lam) * L(y[partners])``.
A :class:`MixedTarget` is therefore a tensor that knows both labellings. Whatever is computed from it is computed on
both, and so are the values that follow from those, however many operations later; nothing is averaged before the value
leaves. That keeps class weights, ``ignore_index``, focal terms, masks and products of label-dependent terms exact
alike.

Code that knows nothing of this sees a plain value: of labels, masks and metrics the *dominant* labelling (the one with
the larger weight), of everything that gradients flow through, and of labels cast to float, the *mixed* value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import Self, override

T = TypeVar("T")


class MixingError(RuntimeError):
    """Manifold Mixup could not do what it promised for this batch; nothing has been updated."""


class Superposition:
    """What all values that descend from one :class:`MixedTarget` share.

    Attributes:
        lam: weight of the first labelling, 0-d tensor.
        used: whether a value with a gradient has come out of it, that is, whether a loss has seen the labels.
        open: until :meth:`close`; from then on its tensors are ordinary ones.
    """

    def __init__(self, lam: Tensor) -> None:
        self.lam = lam
        self.used = False
        self.open = True
        self._written: list[weakref.ref[Tensor]] = []

    def mean(self, first: Tensor, second: Tensor) -> Tensor:
        """``lam * first + (1 - lam) * second``, computed in the wider of their dtype and lam's, returned in theirs."""
        dtype = torch.promote_types(first.dtype, self.lam.dtype)
        mixed = self.lam * first.to(dtype) + (1 - self.lam) * second.to(dtype)
        return mixed.to(first.dtype)

    def dominant(self, first: Tensor, second: Tensor) -> Tensor:
        """``first`` where lam >= 1/2, else ``second``, without asking the device for lam."""
        if first.shape != second.shape:  # `y[y != 255]`: finding the shapes has synchronised already
            return first if self.lam >= 0.5 else second
        return torch.where(self.lam >= 0.5, first, second)

    def adopt(self, tensor: Tensor, first: Tensor, second: Tensor, mixed: bool) -> None:
        """Puts a plain tensor into superposition, because labels were written into it: ``onehot.scatter_(1, y, 1)``."""
        tensor.__class__ = _kind(tensor)
        tensor._set(first, second, self, mixed)  # type: ignore[attr-defined]
        self._written.append(weakref.ref(tensor))

    def close(self) -> None:
        """Ends the superposition: adopted tensors are plain again, all others act as the plain value shown."""
        self.open = False
        for reference in self._written:
            if (tensor := reference()) is not None:
                tensor.__class__ = Tensor
                del tensor._first, tensor._second, tensor._superposition, tensor._mixed  # type: ignore[attr-defined]
        self._written.clear()


class _Superposed(Tensor):
    """A value under two labellings. As a tensor it holds the one value shown to code that does not know it."""

    _first: Tensor
    _second: Tensor
    _superposition: Superposition
    _mixed: (
        bool  # of floats: the value shown is the mixed one, not the dominant one; of integers: floats made of them are
    )

    @staticmethod
    def _of(shown: Tensor, first: Tensor, second: Tensor, superposition: Superposition, mixed: bool) -> _Superposed:
        new = shown.as_subclass(_kind(shown))
        new._set(first, second, superposition, mixed)
        return new

    def _set(self, first: Tensor, second: Tensor, superposition: Superposition, mixed: bool) -> None:
        self._first, self._second, self._superposition, self._mixed = first, second, superposition, mixed

    @classmethod
    @override
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _evaluate(func, args, kwargs or {})

    @property
    def labels(self) -> Tensor:
        """The value under the original labelling, weight lam."""
        return self._first

    @property
    def partners(self) -> Tensor:
        """The value under the partners' labelling, weight 1 - lam."""
        return self._second

    @property
    def lam(self) -> Tensor:
        """Weight of the original labelling, 0-d tensor."""
        return self._superposition.lam

    @property
    def shown(self) -> Tensor:
        """The plain tensor that code without knowledge of the superposition sees."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(labels={self._first!r}, partners={self._second!r}, lam={self.lam!r})"

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    # A copy that outlives the batch (a metric state, a checkpoint, another process) holds the plain value.
    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.shown.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.shown.detach().clone()


class MixedTarget(_Superposed):
    """Integer or boolean labels in superposition: ``y`` with weight lam and ``y[partners]`` with weight 1 - lam.

    To code that does not know it, it is the plain tensor of the dominant labels (``y`` if lam >= 1/2, else
    ``y[partners]``), of the same shape, dtype and device. Casts, moves, views and indexing keep it; any loss
    computed from it, by whatever operations, is ``lam * loss(y) + (1 - lam) * loss(y[partners])`` (section 2, step
    4).

    Usually made by :meth:`lightning_manifold_mixup.Mix.target`.

    Args:
        labels: the original labels, integer or bool.
        partners: the labels of the partners, same shape and dtype.
        lam: weight of ``labels``, a 0-d float tensor.

    Raises:
        TypeError: for labels that are not integer or bool. A float target is mixed as any other tensor: ``mix(y)``.

    Example:
        >>> import torch.nn.functional as F
        >>> y = MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor(0.75))
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> expected = 0.75 * F.cross_entropy(logits, y.labels) + 0.25 * F.cross_entropy(logits, y.partners)
        >>> torch.equal(F.cross_entropy(logits, y).detach(), expected.detach())
        True
        >>> y.shown
        tensor([0, 1])
        >>> F.one_hot(y, 2).shown
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """

    def __new__(cls, labels: Tensor, partners: Tensor, lam: Tensor) -> Self:
        """Puts the two labellings into superposition."""
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"MixedTarget holds class indices, integer or bool; got {labels.dtype}. A float target needs no "
                "superposition: use the mixed tensor, `mix(y)`."
            )
        return cls._superpose(labels, partners, Superposition(lam))

    @classmethod
    def _superpose(cls, labels: Tensor, partners: Tensor, superposition: Superposition) -> Self:
        # A copy: what user code writes into its labels in place must not reach the batch it was made from.
        labels = labels.detach().clone()
        new = cls._of(
            superposition.dominant(labels, partners), labels, partners, superposition, labels.dtype != torch.bool
        )
        assert isinstance(new, cls)
        return new


class MixedValue(_Superposed):
    """A floating point value that depends on a :class:`MixedTarget`: a loss, a weight looked up by label, a soft mask.

    It holds the value under each labelling, so that what is computed from it stays exact. As a tensor it is the mixed
    value ``lam * value(y) + (1 - lam) * value(y[partners])``: ``backward()``, ``item()`` and logging see that.
    """


def _kind(tensor: Tensor) -> type[_Superposed]:
    return MixedValue if tensor.is_floating_point() or tensor.is_complex() else MixedTarget


def plain(tree: Any) -> Any:
    """The structure with the plain tensors that were shown in place of those in superposition."""
    with torch._C.DisableTorchFunctionSubclass():
        return apply_to_collection(tree, _Superposed, _shown, allow_frozen=True)


def labellings(tree: Any) -> list[Tensor]:
    """The plain tensors that carry the labels of a target: as shown, the original ones and the partners'."""
    leaves: list[Tensor] = []

    def note(tensor: Tensor) -> None:
        if isinstance(tensor, _Superposed):
            leaves.extend((tensor.shown, tensor._first, tensor._second))
        else:
            leaves.append(tensor)

    apply_to_collection(tree, Tensor, note)
    return leaves


def superpositions(tree: Any) -> list[Superposition]:
    """The open superpositions of the tensors anywhere in a structure, one for each draw."""
    found: dict[int, Superposition] = {}

    def note(tensor: _Superposed) -> None:
        if tensor._superposition.open:
            found[id(tensor.lam)] = tensor._superposition

    apply_to_collection(tree, _Superposed, note)
    return list(found.values())


def mixed_loss(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Evaluates a function of (logits, labels) as a whole on both labellings: ``lam * f(y) + (1 - lam) * f(partners)``.

    The remedy wherever labels in superposition cannot go: control flow that depends on labels, numpy, custom
    ``autograd.Function``, in-place writes into views.

    Args:
        function: returns a floating point tensor, or a tuple, list or dict of them.
        *args: its arguments; any of them may be, or contain, a :class:`MixedTarget`.
        **kwargs: its keyword arguments, likewise.

    Returns:
        The mixed value as a plain tensor. Without a MixedTarget among the arguments: ``function(*args, **kwargs)``.

    Example:
        >>> import torch.nn.functional as F
        >>> y = MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor(0.75))
        >>> mixed_loss(lambda logits, y: F.nll_loss(logits, y) ** 2, torch.tensor([[0.0, 2.0], [0.0, 4.0]]), y)
        tensor(3.2500)
    """
    return plain(on_both(function, args, kwargs))  # type: ignore[no-any-return]


def on_both(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function`` evaluated as a whole on each labelling; the results in superposition."""
    found = superpositions((args, kwargs))
    if not found:
        return function(*args, **kwargs)
    if len(found) > 1:
        raise MixingError("Expected labels of one mix, got labels of several draws of lam in one call.")
    first = function(*first_labelling(args), **first_labelling(kwargs))
    second = function(*second_labelling(args), **second_labelling(kwargs))
    return paired(first, second, found[0])


def paired(first: Any, second: Any, superposition: Superposition) -> Any:
    """Results for the first and for the second labelling, in superposition."""
    superposition.used |= any(t.requires_grad for t in _tensors((first, second)))
    return _pair(first, second, None, superposition, mixed=True)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation on both labellings
# ---------------------------------------------------------------------------------------------------------------------


# Leaving tensor land: loggers, numpy, printing and tests of closeness get the value shown.
_SHOWN = {"item", "tolist", "numpy", "__array__", "__float__", "__format__", "isclose", "allclose", "equal"}
# Of those, the ones with which a loss could go on.
_LEAVING = {"item", "tolist", "numpy", "__array__"}
# The same for one number: `if loss < 1`, `loss == expected`. Elementwise comparisons are masks and stay in
# superposition.
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne", "__eq__", "__ne__", "isnan", "isinf", "isfinite"}
_CASTS = {"to", "type", "type_as", "bool", "int", "long", "short"}
# About the tensor object, not about its value under a labelling.
_OBJECT = {"__hash__", "backward", "register_hook", "retain_grad", "requires_grad_", "data_ptr", "untyped_storage"}
# The properties that are values; all others (grad_fn, device, ...) are about the object.
_VALUES = {"data", "shape", "T", "mT", "H", "mH", "real", "imag"}
# Picking elements of labels by plain tensors gives labels; any other operation with a plain tensor gives something
# else.
_PICKING = {"__getitem__", "index_select", "gather", "masked_select", "take", "take_along_dim", "where"}
_AUGMENTED = {f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}

_REMEDY = (
    "Put the computation into a function and call `mixed_loss(function, logits, y)`, or into a criterion module "
    "(nn.Module): both are evaluated as a whole, once for each labelling."
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name(func: Callable[..., Any]) -> str:
    """The name of a torch function; of the access to a property, "get" or "set" and the name of that."""
    if func.__name__ in ("__get__", "__set__"):
        return f"{func.__name__.strip('_')} {func.__self__.__name__}"  # type: ignore[attr-defined]
    return func.__name__


def _warn_of_leaving(name: str, sources: Iterable[_Superposed]) -> None:
    """Labels (not the number of hits, not a loss) that differ between the labellings go where nobody can follow."""
    labels = [s for s in sources if isinstance(s, MixedTarget) and s._mixed]
    if torch.compiler.is_compiling() or all(torch.equal(s._first, s._second) for s in labels):
        return
    rank_zero_warn(
        f"`{name}` gave the dominant labels of a mixed batch (y where lam >= 1/2, else y[partners]). That is right "
        "for metrics and logs. A loss must not be computed from them: use `mixed_loss(function, logits, y)` or a "
        f"criterion module there. Silence this by `warnings.filterwarnings('ignore', '`{name}` gave the dominant')`.",
        stacklevel=7,
    )


def _writes(name: str) -> bool:
    """Whether a torch function writes into its first argument."""
    return name == "__setitem__" or name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))


def _evaluate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` under both labellings, and what it gives for the value shown."""
    name = _name(func)
    kind, _, attribute = name.partition(" ")
    if name in _OBJECT or kind == "set" or (kind == "get" and attribute not in _VALUES):
        return func(*args, **kwargs)
    tensors = list(_tensors((args, kwargs)))
    sources = [t for t in tensors if isinstance(t, _Superposed) and t._superposition.open]
    number = isinstance(args[0], MixedValue) and args[0].ndim == 0 if args else False
    mean_gradient = func is torch.autograd.grad and not kwargs.get("create_graph")
    if not sources or name in _SHOWN or (number and name in _COMPARISONS) or mean_gradient:
        if name in _LEAVING:
            _warn_of_leaving(name, sources)
        return func(*_under(args, _shown), **_under(kwargs, _shown))

    superposition = sources[0]._superposition
    for source in sources:
        if source._superposition.lam is not superposition.lam:
            raise MixingError(
                f"`{name}` combines targets of two different mixes. Each draw of lam and permutation makes labels that "
                f"can only be combined with their own kind. {_REMEDY}"
            )
        if source.requires_grad and not (source._first.requires_grad or source._second.requires_grad):
            raise MixingError(
                "A custom autograd.Function (or a reentrant checkpoint) was handed labels in superposition, which it "
                f"can not see through: its result would be that of the dominant labels alone. {_REMEDY}"
            )
    if _writes(name):
        return _write(name, func, args, kwargs, sources, superposition)
    if isinstance(kwargs.get("out"), Tensor):
        raise MixingError(f"`{name}(..., out=...)` cannot be evaluated for two labellings. {_REMEDY}")

    function = _one_hot if func is F.one_hot else func
    if func is F.cross_entropy:
        function, args, kwargs = _with_logarithms(*args, **kwargs)
    first = function(*_under(args, _first), **_under(kwargs, _first))
    second = function(*_under(args, _second), **_under(kwargs, _second))
    recorded = any(t.requires_grad for t in _tensors((first, second)))
    superposition.used |= recorded
    labels_only = name in _PICKING or all(isinstance(t, _Superposed) for t in tensors)
    mixed = recorded or any(s._mixed and (labels_only or isinstance(s, MixedValue)) for s in sources)
    # The value shown of labels, masks and metrics is computed from the value shown, so that views stay views of it.
    shown = None if recorded or function is _one_hot else func(*_under(args, _shown), **_under(kwargs, _shown))
    if next(_tensors(first), None) is None:
        if first is None or first == second:
            return first
        raise MixingError(
            f"`{name}` of a value that depends on the labels is {first!r} for the original labels and {second!r} for "
            f"the partners' labels, so Python cannot go on with both. {_REMEDY}"
        )
    mask = any(s.dtype != torch.bool for s in sources)  # a bool that comes of this is no label
    return _pair(first, second, shown, superposition, mixed, mask, cast=name in _CASTS)


def _pair(
    first: Any,
    second: Any,
    shown: Any,
    superposition: Superposition,
    mixed: bool,
    mask: bool = True,
    cast: bool = False,
) -> Any:
    """One result out of the two, in their structure."""
    if isinstance(first, (tuple, list)):
        if len(first) != len(second):
            raise MixingError(
                f"The number of tensors depends on the labels: {len(first)} against {len(second)}. {_REMEDY}"
            )
        shown = [None] * len(first) if shown is None else shown
        pairs = [_pair(*each, superposition, mixed, mask, cast) for each in zip(first, second, shown, strict=True)]
        return pairs if isinstance(first, list) else tuple(pairs)
    if isinstance(first, dict):
        return {key: _pair(first[key], second[key], None, superposition, mixed) for key in first}
    if not isinstance(first, Tensor):
        return first
    if mixed and first.is_floating_point() and first.shape == second.shape:
        shown = superposition.mean(first, second)
    elif shown is None or (mixed and cast and not first.is_floating_point()):
        shown = superposition.dominant(first, second)
    return _Superposed._of(shown, first, second, superposition, mixed and not (mask and first.dtype == torch.bool))


def _write(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sources: list[_Superposed],
    superposition: Superposition,
) -> Any:
    """An operation that writes into its first argument: done to both labellings of it, and to the value shown."""
    target, *others = args
    inside = isinstance(target, _Superposed) and target._superposition.open
    first, second = (target._first, target._second) if inside else (target.clone(), target.clone())
    func(first, *_under(others, _first), **_under(kwargs, _first))
    func(second, *_under(others, _second), **_under(kwargs, _second))
    recorded = first.requires_grad or second.requires_grad
    superposition.used |= recorded
    mixed = target.is_floating_point() and (recorded or any(s._mixed or s.dtype == torch.bool for s in sources))
    if mixed:
        if not inside and target._is_view():
            raise MixingError(
                f"`{name}` writes labels into a view, whose base would not know that it depends on them. {_REMEDY}"
            )
        target.copy_(superposition.mean(first, second))
    else:
        func(target, *_under(others, _shown), **_under(kwargs, _shown))
    if not inside and not target._is_view():
        superposition.adopt(target, first, second, mixed)
    elif inside:
        target._first, target._second, target._mixed = first, second, target._mixed and (mixed or target._mixed)
    return None if name == "__setitem__" else target


def _with_logarithms(
    input: Tensor, target: Tensor, *args: Any, **kwargs: Any
) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """``F.cross_entropy`` as ``F.nll_loss`` of log-probabilities, which are the same for both labellings.

    The largest tensors of a network with many classes are computed and kept once, not twice.
    """
    names = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    if arguments.pop("label_smoothing", 0.0) or isinstance(input, _Superposed) or target.is_floating_point():
        return F.cross_entropy, (input, target, *args), kwargs
    if torch.is_autocast_enabled(input.device.type):  # it casts for cross_entropy, and on CPUs not for log_softmax
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    return F.nll_loss, (F.log_softmax(input, dim=min(input.ndim - 1, 1)), target), arguments


def _one_hot(*args: Any, **kwargs: Any) -> Tensor:
    """``F.one_hot`` in floating point, which is what a mixed one-hot is."""
    return F.one_hot(*args, **kwargs).to(torch.get_default_dtype())


def first_labelling(tree: Any) -> Any:
    """The structure under the original labels."""
    return apply_to_collection(tree, _Superposed, _first)


def second_labelling(tree: Any) -> Any:
    """The structure under the partners' labels."""
    return apply_to_collection(tree, _Superposed, _second)


def _first(value: Tensor) -> Tensor:
    return value._first if isinstance(value, _Superposed) and value._superposition.open else value


def _second(value: Tensor) -> Tensor:
    return value._second if isinstance(value, _Superposed) and value._superposition.open else value


def _shown(value: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not isinstance(value, _Superposed):  # as_subclass(Tensor) cannot be traced
        return value
    return value.as_subclass(Tensor)


def _under(tree: Any, labelling: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a torch function (nested tuples, lists and dicts at most) under one labelling."""
    if isinstance(tree, Tensor):
        return labelling(tree)
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        return type(tree)([_under(item, labelling) for item in tree])
    if isinstance(tree, dict):
        return {key: _under(item, labelling) for key, item in tree.items()}
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
