"""Watching torch functions: what each one reads, and what it makes or writes into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_manifold_mixup._step.batch.tree import tensors


class Read(NamedTuple):
    """A tensor and its state before an operation read it. The operation may work in place and change this state."""

    tensor: Tensor
    version: int
    grad_fn: Any
    requires_grad: bool


class Recording(TorchFunctionMode, ABC):
    """Runs every torch function as it is, and hands it on to ``record``."""

    @abstractmethod
    def record(
        self, func: Any, args: Any, kwargs: Any, reads: Sequence[Read], made: list[Tensor], written: list[Tensor]
    ) -> None:
        """Take note of one operation that has results. Calls of torch functions in here are not recorded.

        Args:
            func: the torch function.
            args: its arguments.
            kwargs: its keyword arguments.
            reads: the tensors whose values it has read.
            made: the tensors among its results that it has not been handed.
            written: the tensors among ``reads`` that it has written into.
        """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Labels in superposition are a tensor subclass, whose own ``__torch_function__`` must not answer here.
        with torch._C.DisableTorchFunctionSubclass():
            reads = [read_of(tensor) for tensor in tensors(_values(function_name(func), args, kwargs))]
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            made = [tensor for tensor in tensors(out) if not any(tensor is read.tensor for read in reads)]
            written = [read.tensor for read in reads if version_of(read.tensor) != read.version]
            if made or written:
                self.record(func, args, kwargs, reads, made, written)
        return out


def function_name(func: Any) -> str:
    """Return the name of a torch function; empty if it has none."""
    return getattr(func, "__name__", "")


def read_of(tensor: Tensor) -> Read:
    """Return a tensor with its state at this moment."""
    return Read(tensor, version_of(tensor), tensor.grad_fn, tensor.requires_grad)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor's memory has been written into, as far as PyTorch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def _values(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Leave out the tensors that an operation asks for their shape or type only."""
    if name.endswith("_like") or name.startswith("new_"):
        return ()
    if name.endswith("_as") or name == "to":
        return args[:1]
    return args, kwargs
