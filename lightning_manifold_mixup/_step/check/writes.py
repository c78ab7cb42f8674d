"""Notes what a training step writes into the weights that it shares with its ghost, and takes it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self, override


class Writes(TorchDispatchMode):
    """Notes which parameters the code inside writes into, and gives them their values back at the end.

    Steps do that themselves with momentum encoders, weights that are normalised or clipped, and sharpness-aware
    steps. A parameter is copied when it is written into for the first time; the others cost nothing.

    Args:
        parameters: to be watched.

    Attributes:
        found: those that were written into, or whose ``data`` was replaced.
        count: how many writes there were so far.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = layer.weight.item()
        >>> with Writes(layer.parameters()) as writes:
        ...     _ = layer.weight.data.mul_(2)
        >>> layer.weight.item() == before, writes.found == {layer.weight}
        (True, True)
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[nn.Parameter] = set()
        self.count = 0
        # By the address of the memory: a parameter, its ``data`` and its views are different objects.
        self._owners = {_memory(parameter): (parameter, parameter.data) for parameter in parameters}
        self._before: dict[int, Tensor] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for tensor in _written(func, args, kwargs or {}):
                memory = _memory(tensor)
                if memory in self._owners:
                    self.count += 1
                    if memory not in self._before:
                        self._before[memory] = self._owners[memory][1].clone()
        with torch._C.DisableTorchFunction():  # this runs inside an operation and is no call of the user's
            return func(*args, **(kwargs or {}))

    @override
    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for memory, (parameter, values) in self._owners.items():
                if memory in self._before:
                    values.copy_(self._before[memory])
                    self.found.add(parameter)
                if _memory(parameter) != memory:
                    parameter.data = values
                    self.found.add(parameter)
        self._before.clear()


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Return the tensors that an operation writes into, as its schema says."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor):
                yield item
