"""What Python code gets when it reads values in superposition on the host, in the pair oracle and in training."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_manifold_mixup._step.check.usage import in_torchmetrics
from lightning_manifold_mixup._step.labels.pairs import REMEDY
from lightning_manifold_mixup._step.labels.targets import MixingError, SuperpositionError

# More reads than this are taken for a loop that waits for another value.
_READS = 1000
# Functions that make a tensor of an array or a list.
_FROM_HOST = {"tensor", "as_tensor", "asarray", "new_tensor"}
_LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, torchmetrics.__file__))
_LIBRARIES += (str(Path(__file__).parents[2]),)

# A line of code: the code object, and the number of the line.
Line = tuple[Any, int]


def reading_line() -> Line:
    """Return the line of the user's code that is running."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return frame.f_code, frame.f_lineno


def place_of(line: Line) -> str:
    """Name a line of code for people.

    Example:
        >>> place_of((compile("1", "/home/me/train.py", "eval"), 7))
        'train.py, line 7,'
    """
    code, number = line
    return f"{Path(code.co_filename).name}, line {number},"


class Reads:
    """Answers Python code that reads values in superposition on the host, and notes that it did.

    Args:
        answers: what reads return, in turn: 0 for the value shown, 1 and -1 for what it might be in another batch.

    Attributes:
        asked: how often a value was read that depends on the labelling.
        lines: where.
        returned: whether arrays or lists were read, and tensors were made of arrays or lists after that.
    """

    def __init__(self, answers: Sequence[int] = (0,)) -> None:
        self._answers = answers
        self._arrays = False
        self.asked = 0
        self.lines: set[Line] = set()
        self.returned = False

    def __call__(self, name: str, first: Any, second: Any, shown: Any) -> Any:
        """Return what is read."""
        answer = self._answers[self.asked % len(self._answers)]
        self.asked += 1
        self.lines.add(reading_line())
        if self.asked > _READS:
            raise MixingError("A loop waits for a value that depends on the labels")
        self._arrays |= isinstance(shown, (list, np.ndarray))
        return shown if answer == 0 else _disturbed(shown, answer, (first, second))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note what is made of arrays and lists inside."""
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
        """Note that a tensor has been made of an array or a list."""
        self.returned |= self._arrays and not in_torchmetrics()


def _disturbed(shown: Any, answer: int, labellings: tuple[Any, Any]) -> Any:
    """Return what might be read in another batch: of labels, each class is another one that is there, too."""
    if isinstance(shown, bool):
        return answer > 0
    if isinstance(shown, (int, float)):
        return type(shown)(shown + answer * (10 * abs(shown) + 10))
    if isinstance(shown, list):
        return _disturbed(np.asarray(shown), answer, labellings).tolist()
    if not isinstance(shown, np.ndarray) or not shown.size:
        return labellings[answer > 0]
    if shown.dtype.kind == "f":
        return shown + answer * (10 * np.abs(shown) + 10)
    classes, which = np.unique(shown, return_inverse=True)
    return classes[(which + answer) % len(classes)].reshape(shown.shape)


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
        harmless: lines of code for which it is known that what they read has no effect on the loss.
        deciding: whether other lines may decide by what they read, because the oracles are asked about them at once.

    Attributes:
        new: those other lines, and by what they read.
    """

    def __init__(self, harmless: Collection[Line] = (), *, deciding: bool = False) -> None:
        self._harmless, self._deciding = harmless, deciding
        self.new: dict[Line, str] = {}

    def __call__(self, name: str, first: Any, second: Any, shown: Any) -> Any:
        """Return what is read."""
        line = reading_line()
        if line in self._harmless:
            return shown
        self.new[line] = name
        if not self._deciding and isinstance(first, bool) and first != second:
            raise SuperpositionError(
                f"`{name}` of a value that depends on the labels is {first} for the dominant labels and {second} for "
                f"the others, so Python cannot go on with both. {REMEDY}"
            )
        return shown
