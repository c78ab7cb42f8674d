"""What Python code gets that reads values in superposition on the host: in the pair oracle, and in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_manifold_mixup._step.targets import MixingError, SuperpositionError
from lightning_manifold_mixup._step.usage import in_torchmetrics

# A host read that is asked more often than this is a loop that waits for it.
_READS = 1000
# Functions that make a tensor of an array or a list.
_FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor"}


class Reads:
    """Answers Python code that reads values in superposition on the host, and notes that it did.

    Args:
        answers: what is read: 0 as it is shown, 1 and -1 as it might be in another batch; in turn.

    Attributes:
        asked: how often a value was read that depends on the labelling.
        returned: whether arrays or lists were read, and tensors were made of arrays or lists after that.
    """

    def __init__(self, answers: Sequence[int] = (0,)) -> None:
        self._answers = answers
        self._arrays = False
        self.asked = 0
        self.returned = False

    def __call__(self, name: str, first: Any, second: Any, shown: Any) -> Any:
        """What is read."""
        answer = self._answers[self.asked % len(self._answers)]
        self.asked += 1
        if self.asked > _READS:
            raise MixingError("A loop waits for a value that depends on the labels.")
        self._arrays |= isinstance(shown, (list, np.ndarray))
        if answer == 0:
            return shown
        if isinstance(shown, bool):
            return answer > 0
        if isinstance(shown, (int, float)):
            far = 10 * abs(shown) + 10
            return type(shown)(shown + answer * far)
        return second if answer > 0 else first

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notes what is made of arrays and lists inside."""
        from_numpy = torch.from_numpy  # the one that no TorchFunctionMode sees

        def noted(array: Any) -> Tensor:
            self.note_return()
            return from_numpy(array)

        torch.from_numpy = noted  # type: ignore[assignment]
        try:
            with _Returns(self):
                yield
        finally:
            torch.from_numpy = from_numpy

    def note_return(self) -> None:
        """A tensor has been made of an array or a list."""
        self.returned |= self._arrays and not in_torchmetrics()


class _Returns(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    @override
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func.__name__ in _FROM_HOST and any(isinstance(arg, (list, np.ndarray)) for arg in args)
        if made or any(isinstance(arg, np.ndarray) for arg in args):
            self._reads.note_return()
        return func(*args, **(kwargs or {}))


class Answers:
    """Answers Python code that reads values in superposition while a batch is trained on.

    Args:
        lenient: whether it is known that what is read has no effect on the loss.

    Attributes:
        asked: how often a value was read that depends on the labelling.
    """

    def __init__(self, lenient: bool) -> None:
        self.lenient = lenient
        self.asked = 0

    def __call__(self, name: str, first: Any, second: Any, shown: Any) -> Any:
        """What is read."""
        self.asked += 1
        if not self.lenient and isinstance(first, bool) and first != second:
            raise SuperpositionError(
                f"`{name}` of a value that depends on the labels is {first} for the dominant labels and {second} for "
                "the others, so Python cannot go on with both."
            )
        return shown
