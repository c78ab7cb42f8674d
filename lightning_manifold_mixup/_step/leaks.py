"""Labels that got away: read by code that takes no notice of tensor subclasses, for which they are the dominant ones.

TorchScript functions, ``torch.vmap`` and ``torch.tensor(y)`` are such code. Where the loss knows of no other use of the
labels, the check of each batch finds that none was used. Beside a second loss that does use them it would not, and half
of the loss would be that of the dominant labels. One observed batch shows it: an operation of PyTorch's core that is
handed a :class:`MixedTarget` as it is (``targets.py`` hands on plain tensors only) has not been evaluated for both
labellings.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_manifold_mixup._step.targets import MixedTarget


class Leaks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes where labels that have lost their superposition meet what is trained. It changes nothing.

    Attributes:
        found: the operation and the line of the user's code, of the first such place; None if there is none.

    Example:
        >>> y = MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor(0.75))
        >>> logits = torch.randn(2, 3, requires_grad=True)
        >>> with Leaks() as leaks:
        ...     loss = torch.nn.functional.cross_entropy(logits, y)
        >>> leaks.found is None
        True
        >>> with Leaks() as leaks:
        ...     loss = torch.vmap(torch.nn.functional.cross_entropy)(logits, y).mean()
        >>> leaks.found  # doctest: +ELLIPSIS
        '`gather` in `loss = torch.vmap(torch.nn.functional.cross_entropy)(logits, y).mean()` (...'
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: str | None = None
        self._copies: dict[int, Tensor] = {}  # by memory; kept, so that no other tensor gets that memory

    @override
    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        unaware = torch._C._is_torch_function_enabled()  # targets.py, for one, switches that off
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if unaware and self.found is None:
                read = list(_tensors(args))
                if any(map(self._is_label, read)):
                    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read):
                        self.found = f"`{func.overloadpacket.__name__}`{_line_of_the_user()}"
                    else:
                        self._copies |= {_memory(tensor): tensor for tensor in _tensors((result,))}
        return result

    def _is_label(self, tensor: Tensor) -> bool:
        return isinstance(tensor, MixedTarget) or (bool(self._copies) and _memory(tensor) in self._copies)


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation, which takes lists of them at most."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def _line_of_the_user() -> str:
    """Where in the program that was, libraries aside."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(ours) and frame.line:
            return f" in `{frame.line}` ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
