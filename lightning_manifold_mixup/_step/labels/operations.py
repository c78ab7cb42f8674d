"""The rules by which torch functions are evaluated on labels in superposition; ``targets.py`` says what those are.

The general rule is ``_on_both``: the function is called once for each labelling. The table ``_RULES`` has the
exceptions, each with its reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_manifold_mixup._step.devices import float64
from lightning_manifold_mixup._step.labels.pairs import REMEDY, note_use, paired, tensors
from lightning_manifold_mixup._step.labels.targets import (
    KINDS,
    SAMPLES,
    Superposed,
    Superposition,
    SuperpositionError,
    shown_value,
)

Function = Callable[..., Any]
Rule = Callable[[str, Function, Any, Any, Superposition], Any]


def evaluate(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute ``func`` for both labellings. Called with the dispatch of tensor subclasses switched off."""
    name = _name(func)
    found = [t for t in tensors((args, kwargs)) if isinstance(t, Superposed)]
    sources = [t for t in found if t.superposition.open]
    if not sources:  # the loss has been taken
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if in_backward and _is_of_values(name):
            for tensor in found:
                tensor.superposition.read_late = True
        return func(*_under(args, shown_value), **_under(kwargs, shown_value))
    superposition = sources[0].superposition
    summed = [source for source in sources if source.superposition.summed]
    if summed and (len(summed) < len(sources) or not _is_linear(name, args, len(summed))):
        raise SuperpositionError(
            f"`{name}` of a loss whose samples were summed up, each with a lam of its own: no single lam is left for "
            f"what is no sum. Draw one lam for the batch, or {SAMPLES}."
        )
    for source in sources:
        if source.superposition is not superposition:
            raise SuperpositionError(
                f"`{name}` combines targets of two different mixes. Each draw of lam and partners makes labels that "
                f"can only be combined with their own kind. {REMEDY}"
            )
    rule = _RULES.get(name, _on_both)
    if name.startswith("get "):
        rule = _on_both if name[4:] in _VALUES else _of_the_object
    elif name.startswith("set ") or _writes(name):
        rule = _write
    try:
        return rule(name, func, args, kwargs, superposition)
    except SuperpositionError as error:
        superposition.give_up(error)
    return func(*args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name(func: Function) -> str:
    """Return the name of a torch function; for access to a property, "get" or "set" and its name."""
    if func.__name__ in ("__get__", "__set__"):
        return f"{func.__name__.strip('_')} {func.__self__.__name__}"  # type: ignore[attr-defined]
    return func.__name__


def _on_both(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    if isinstance(kwargs.get("out"), Tensor):
        raise SuperpositionError(f"`{name}(..., out=...)` cannot be evaluated for two labellings. {REMEDY}")
    first = func(*_under(args, _first), **_under(kwargs, _first))
    second = func(*_under(args, _second), **_under(kwargs, _second))
    recorded = note_use(superposition, (first, second))
    read = list(tensors((args, kwargs)))
    steady = name in _STEADY or all(isinstance(t, Superposed) and t.steady for t in read)
    steady &= not _by_position(name, args)
    averaged = recorded or any(isinstance(t, Superposed) and t.averaged for t in read)
    return paired(first, second, superposition, steady=steady, averaged=averaged)


def _is_of_values(name: str) -> bool:
    """Whether a function is of the values of its tensors, not of their shape or of them as objects."""
    if name.startswith("get "):
        return name[4:] in _VALUES and name != "get shape"
    return name not in _SHAPES and _RULES.get(name) is not _of_the_object


def _by_position(name: str, args: Any) -> bool:
    """Whether single samples are picked: both labellings may agree on them here, and differ in another batch."""
    if name in ("select", "unbind", "narrow", "split", "chunk"):
        return True
    if name != "__getitem__":
        return False
    index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
    if isinstance(index, Tensor):
        return index.ndim == 0
    return not (index is None or index is Ellipsis or (isinstance(index, slice) and index == slice(None)))


def _of_the_object(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    """Answer for the tensor as an object, not for its value under a labelling."""
    return func(*_under(args, _first), **_under(kwargs, _first))


def _read(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    """Take a value to the host, where Python code may do anything with it."""
    decides = name in _DECISIONS
    first = func(*_under(args, _first), **_under(kwargs, _first))
    second = func(*_under(args, _second), **_under(kwargs, _second))
    read = [t for t in tensors((args, kwargs)) if isinstance(t, Superposed)]
    same = first == second if decides else all(torch.equal(t.first, t.second) for t in read)
    if same and all(t.steady for t in read):
        return first
    shown = first if decides else func(*_under(args, shown_value), **_under(kwargs, shown_value))
    if superposition.reader is not None:
        return superposition.reader(name, first, second, shown)
    if decides and not same:
        raise SuperpositionError(
            f"`{name}` of a value that depends on the labels is {first!r} for the dominant labels and {second!r} for "
            f"the others, so Python cannot go on with both. {REMEDY}"
        )
    return shown


def _of_the_mean(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    """Make text for people, or back-propagate the mixed loss in a backward pass of the user's own."""
    return func(*_under(args, shown_value), **_under(kwargs, shown_value))


def _gradient(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    """Compute ``torch.autograd.grad``: of the mixed loss; of both where the result is to be differentiated again."""
    rule = _on_both if kwargs.get("create_graph") else _of_the_mean
    return rule(name, func, args, kwargs, superposition)


def _write(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    """Write for both labellings; the tensor that is written into is in superposition from then on.

    It is refused where other tensors share the memory (views, a row of a user's table): these would not be written for
    both labellings.
    """
    target, *others = args
    inside = isinstance(target, Superposed)
    # A value in superposition is itself a second name of the memory of its first part.
    parts = ((target.first, 2), (target.second, 1)) if inside else ((target, 1),)
    shared = any(part._is_view() or _is_shared(part, names) for part, names in parts)
    if shared or name.startswith("set ") or name in _HOOKS:
        raise SuperpositionError(
            f"`{name}` writes what depends on the labels into memory that other tensors share. {REMEDY}"
        )
    read = list(tensors((others, kwargs)))
    averaged = any(isinstance(t, Superposed) and t.averaged for t in read)
    if not inside:
        first, second = target.clone(), target.clone()
        func(target, *_under(others, _first), **_under(kwargs, _first))
        superposition.hold(first, second, steady=False, averaged=False, tensor=target)
    elif target.apart:
        func(target, *_under(others, _first), **_under(kwargs, _first))
    func(target.first, *_under(others, _first), **_under(kwargs, _first))
    func(target.second, *_under(others, _second), **_under(kwargs, _second))
    recorded = note_use(superposition, (target.first, target.second))
    target.steady = target.steady and all(isinstance(t, Superposed) and t.steady for t in read)
    target.averaged = target.averaged or ((recorded or averaged) and target.is_floating_point())
    return None if name == "__setitem__" else target


def _is_shared(tensor: Tensor, names: int) -> bool:
    """Whether more tensors than the ``names`` that we know of hold the same memory."""
    if torch.compiler.is_compiling():
        return False
    alone = torch.empty(0)
    return _holders(tensor) > _holders(alone) + names - 1


def _holders(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    return holders


def _cross_entropy(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    """Compute the NLL of log-probabilities, which both labellings share: the largest tensors are made once."""
    if superposition.lam.ndim:
        return _per_sample(name, func, args, kwargs, superposition)
    if len(args) == 2:
        logits, target = args
    else:
        bound = inspect.signature(F.cross_entropy).bind(*args, **kwargs)
        logits, target = bound.arguments.pop("input"), bound.arguments.pop("target")
        kwargs = bound.arguments
    if kwargs.get("label_smoothing") or isinstance(logits, Superposed) or target.is_floating_point():
        return _on_both(name, func, args if len(args) == 2 else (logits, target), kwargs, superposition)
    kwargs = {key: value for key, value in kwargs.items() if key != "label_smoothing"}
    if torch.is_autocast_enabled(logits.device.type):  # it casts for cross_entropy, and on CPUs not for log_softmax
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probabilities = F.log_softmax(logits, dim=min(logits.ndim - 1, 1))
    return _on_both(name, F.nll_loss, (log_probabilities, target), kwargs, superposition)


def plain_cross_entropy(
    logits: Tensor,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,  # noqa: FBT001
    ignore_index: int = -100,
    reduce: bool | None = None,  # noqa: FBT001
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Compute ``_cross_entropy`` for the usual arguments, with little work in Python; None for others."""
    if (  # no other subclass than the target: their dispatch need not be switched off, which takes time
        type(target) is not KINDS[False]
        or type(logits) is not Tensor
        or not (weight is None or type(weight) is Tensor)
        or not (superposition := target.superposition).open
        or superposition.lam.ndim
        or label_smoothing
        or size_average is not None
        or reduce is not None
        or torch.is_autocast_enabled(logits.device.type)
    ):
        return None
    log_probabilities = torch.log_softmax(logits, min(logits.ndim - 1, 1))
    how = weight, None, ignore_index, None, reduction
    first, second = (F.nll_loss(log_probabilities, y, *how) for y in (target.first, target.second))
    recorded = first.requires_grad
    superposition.used |= recorded
    return superposition.hold(first, second, steady=False, averaged=recorded)


def _per_sample(name: str, func: Function, args: Any, kwargs: Any, superposition: Superposition) -> Any:
    """Compute the losses of samples, each with a lam of its own: weighted before they are summed up."""
    if not superposition.lam.ndim:
        return _on_both(name, func, args, kwargs, superposition)
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    reduction = arguments["reduction"]
    if reduction == "none":
        return _on_both(name, func, args, kwargs, superposition)
    arguments["reduction"] = "none"
    results = []
    lam, mean = float64(superposition.lam), superposition.reduced.lam
    for number, weight in enumerate((lam / mean, (1 - lam) / (1 - mean))):
        under = _under(dict(arguments), partial(_originally, number=number))
        losses = func(**under)
        share = weight.to(losses).reshape(weight.shape + (1,) * (losses.ndim - 1))
        total = (losses * share).sum()
        results.append(total / _count(under, losses) if reduction == "mean" else total)
    note_use(superposition, results)
    first, second = results
    return paired(first, second, superposition.reduced)


def _count(arguments: dict[str, Any], losses: Tensor) -> Tensor | int:
    """Return the divisor of ``reduction="mean"``: the class weights of labels that count, or the number of losses."""
    if "ignore_index" not in arguments or arguments["target"].is_floating_point():
        return losses.numel()
    counted = arguments["target"] != arguments["ignore_index"]
    if arguments["weight"] is None:
        total: Tensor = counted.sum()
        return total
    total = (arguments["weight"][arguments["target"].where(counted, 0)] * counted).sum()
    return total


# What may be done with losses that were summed up by a lam for each sample.
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
_QUOTIENTS = {"div", "__truediv__", "divide", "true_divide"}
_LINEAR = {
    "add", "__add__", "__radd__", "sub", "__sub__", "rsub", "__rsub__", "neg", "__neg__", "sum", "mean", "stack",
    "squeeze", "unsqueeze", "view", "reshape", "detach", "clone", "to", "type", "float", "double", "cpu",
    "cuda", "item", "tolist", "numpy", "__array__", "__float__", "__format__", "__repr__", "__str__", "__bool__",
    "backward", "isnan", "isinf", "isfinite", "dim", "size", "numel", "__len__", "__hash__",
    "is_floating_point", "__getitem__", "unbind", "grad",
}  # fmt: skip


def _is_linear(name: str, args: Any, count: int) -> bool:
    """Whether an operation is linear in the ``count`` values in superposition among its arguments."""
    if name in _PRODUCTS | _QUOTIENTS:
        return count == 1 and (name in _PRODUCTS or isinstance(args[0], Superposed))
    return name in _LINEAR or name.startswith("get ")


# A property that is a value; all others (grad_fn, device, ...) are of the object.
_VALUES = {"data", "shape", "T", "mT", "H", "mH", "real", "imag"}
_SHAPES = {
    "size", "dim", "ndimension", "numel", "nelement", "__len__", "stride", "is_contiguous", "is_floating_point",
    "get_device", "element_size",
}  # fmt: skip
# Whether a value is finite differs between the labellings only if training has diverged anyway.
_STEADY = {"isnan", "isinf", "isfinite"}
_DECISIONS = {"__bool__", "is_nonzero", "__index__", "__contains__"}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "set_"}
_AUGMENTED = {f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}

_RULES: dict[str, Rule] = {
    **dict.fromkeys(("__hash__", "data_ptr", "untyped_storage", "storage", "_is_view", "is_complex"), _of_the_object),
    **dict.fromkeys(("item", "tolist", "numpy", "__array__", "__float__", "__int__", "__complex__"), _read),
    **dict.fromkeys(("equal", "allclose", *_DECISIONS), _read),
    **dict.fromkeys(("__format__", "__repr__", "__str__", "backward"), _of_the_mean),
    **dict.fromkeys(("nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"), _per_sample),
    **dict.fromkeys(_HOOKS, _write),
    "cross_entropy": _cross_entropy,
    "grad": _gradient,
}


def _writes(name: str) -> bool:
    return name == "__setitem__" or name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))


def _first(value: Tensor) -> Tensor:
    return value.first if isinstance(value, Superposed) and value.superposition.open else shown_value(value)


def _second(value: Tensor) -> Tensor:
    return value.second if isinstance(value, Superposed) and value.superposition.open else shown_value(value)


def _originally(value: Tensor, number: int) -> Tensor:
    """Return the value under the original labelling (number 0), or under that of the partners (1)."""
    if isinstance(value, Superposed) and value.superposition.open:
        return value.superposition.ordered(value.first, value.second)[number]
    return shown_value(value)


def _under(tree: Any, labelling: Callable[[Tensor], Tensor]) -> Any:
    """Return the arguments of a torch function (nested tuples, lists and dicts at most) under one labelling."""
    if isinstance(tree, Tensor):
        return labelling(tree)
    if isinstance(tree, (tuple, list)) and not isinstance(tree, torch.Size):
        return type(tree)([_under(item, labelling) for item in tree])
    if isinstance(tree, dict):
        return {key: _under(item, labelling) for key, item in tree.items()}
    return tree
