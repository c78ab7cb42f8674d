"""Functions on a module that hold it in their closure: copied, to hold the ghost instead.

``copy.deepcopy`` takes functions as they are. A ``module.forward = lambda x: module.net(x)``, a wrapped
``training_step`` or a forward hook would so run on the module itself, and write into its lists.
"""

from __future__ import annotations

import copy
import functools
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def rebind(ghost: nn.Module, memo: dict[int, Any]) -> None:
    """Give all functions on the parts of a ghost closures over the ghost.

    Args:
        ghost: changed in place.
        memo: of the ``copy.deepcopy`` that made it: the copies, by the identity of the originals.
    """
    for part in ghost.modules():
        for mapping in (vars(part), *(getattr(part, name) for name in _HOOKS)):
            for name, value in list(mapping.items()):
                if isinstance(value, (FunctionType, functools.partial)):
                    mapping[name] = _rebound(value, memo)


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        arguments = (_rebound(arg, memo) for arg in value.args)
        keywords = {name: _rebound(arg, memo) for name, arg in value.keywords.items()}
        return functools.partial(_rebound(value.func, memo), *arguments, **keywords)
    if isinstance(value, (list, dict, set)) or _knows(value, memo):
        return copy.deepcopy(value, memo)
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    cells = [CellType() for _ in value.__closure__]
    copied = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    memo[id(value)] = copied  # before its cells: a function may be in its own closure
    copied.__kwdefaults__ = value.__kwdefaults__
    vars(copied).update(vars(value))
    for cell, original in zip(cells, value.__closure__, strict=True):
        if original != CellType():  # one that has been filled already
            cell.cell_contents = _rebound(original.cell_contents, memo)
    return copied


def _knows(value: Any, memo: dict[int, Any]) -> bool:
    """Whether an object keeps what has been copied, or a method of it, or is a callback, which is handed the module."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(value, (nn.Module, ModuleType, type)) or not isinstance(attributes, dict):
        return False
    kept = (getattr(attribute, "__self__", attribute) for attribute in attributes.values())
    return hasattr(value, "on_train_batch_start") or any(id(attribute) in memo for attribute in kept)
