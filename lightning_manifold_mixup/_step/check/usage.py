"""How a training step uses its floating point targets: as values, or as classes.

A value (a temperature, soft labels) is mixed as a number. A float that the step rounds, compares, or casts to integers
stands for a class or a flag: the mean of two classes would be a third one. It belongs in superposition, as integer
labels do. So does a float that the loss reads together with another target (the weight of a sample, the visibility of a
point, and the point itself): a mixed weight would meet the labels of both samples, and a mixed point would hold a part
of one that nobody has seen. The type does not tell any of this, so one plain training step is watched.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self, override

from lightning_manifold_mixup._step.batch.tree import tensors
from lightning_manifold_mixup._step.check.recording import Read, Recording, function_name

Use = Literal["values", "classes", "both"]

# Operations that move entries and keep their values. They are run on the numbers of the columns, too.
_MOVES = {
    "__getitem__", "__get__", "__iter__", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel",
    "squeeze", "unsqueeze", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "select",
    "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "index_select", "gather",
    "take_along_dim", "masked_select", "expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave",
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "roll", "flip", "diagonal", "unfold",
}  # fmt: skip
# Those of them that take several tensors.
_JOINS = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack",
}  # fmt: skip
# What keeps the terms of several targets apart: lam * (a + b) + (1 - lam) * (c + d) is the sum of the mixed ones.
_SUMS = _JOINS | {
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "subtract", "rsub", "__sub__", "__rsub__",
    "__isub__",
}  # fmt: skip
# Operations that find an order or whole numbers, and return floats.
_DISCRETE = {
    "sort", "msort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "unique", "round", "floor", "ceil",
    "trunc", "fix", "sign", "sgn", "heaviside", "floor_divide", "__floordiv__", "__rfloordiv__",
}  # fmt: skip
# Losses whose float target is 1 or -1: they compare inside, or are not linear in it.
_FLAGS = {
    "cosine_embedding_loss", "hinge_embedding_loss", "margin_ranking_loss", "soft_margin_loss",
}  # fmt: skip

_PRODUCTS = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
_LINE = 100
"""Characters of a line of code that a message shows."""
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))


class _Label(NamedTuple):
    """What a tensor that was computed from targets alone says about them.

    Attributes:
        columns: the columns whose values it holds: a tensor of its shape with their numbers, or the set of them.
        classes: the columns that it holds as classes.
        line: where they were made classes.
    """

    columns: Tensor | frozenset[int]
    classes: frozenset[int]
    line: str


class _Origin(NamedTuple):
    """Which targets a tensor was computed from, whatever else it was computed from.

    Attributes:
        keys: their keys.
        joint: those among them that an operation has read together, and the line where it did.
    """

    keys: frozenset[str]
    joint: Mapping[str, str]


@dataclass
class _Target:
    """The numbers of a target's columns, whether it holds 1 and -1 or 0 and 1 alone, and what was seen of it."""

    numbers: range
    signs: bool
    flags: bool
    values: set[int] = field(default_factory=set)
    classes: set[int] = field(default_factory=set)
    value_line: str = ""
    class_line: str = ""
    joint_line: str = ""
    flag_line: str = ""


class LabelUse(Recording):
    """Notes how the code that runs inside uses floating point targets. It changes nothing.

    A use counts if it reaches what is trained: if an operation reads a tensor computed from targets alone and one that
    carries a gradient. A check on the host (``assert y.min() >= 0``) or a metric does not count.

    Args:
        targets: the targets by key, as the code inside will hold them. Those of integers are noted as what others are
            read together with.

    Example:
        >>> y = torch.tensor([0.0, 2.0, 1.0])
        >>> logits = torch.randn(3, 4, requires_grad=True)
        >>> with LabelUse({"y": y}) as use:
        ...     loss = torch.nn.functional.cross_entropy(logits, y.long())
        >>> use.verdict("y")
        'classes'
        >>> with LabelUse({"y": y}) as use:
        ...     loss = torch.nn.functional.mse_loss(logits[:, 0], y)
        >>> use.verdict("y")
        'values'
    """

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._targets: dict[str, _Target] = {}
        self._labels: Any = WeakIdKeyDictionary()
        self._origins: Any = WeakIdKeyDictionary()
        # Computed from what is trained, without a gradient: the predictions that a metric gets.
        self._predictions: Any = WeakIdKeyDictionary()
        self._stack = ExitStack()
        start = 0
        with torch._C.DisableTorchFunctionSubclass():
            for key, target in targets.items():
                known = self._origins[target].keys if target in self._origins else frozenset()
                self._origins[target] = _Origin(known | {key}, {})
                if target.is_floating_point():
                    columns = _columns(target)
                    signs = bool((target.abs() == 1).all()) and bool((target < 0).any())
                    flags = bool(((target == 0) | (target == 1)).all())
                    self._targets[key] = _Target(range(start, start + columns[1]), signs, flags)
                    self._labels[target] = _Label(columns[0] + start, frozenset(), "")
                    start += columns[1]

    def __enter__(self) -> Self:
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled part would not be seen
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._stack.close()

    def verdict(self, key: str) -> Use:
        """Say how a target was used.

        Returns:
            ``"classes"`` if all columns that were used as values were used as classes, too, or if the target was read
            together with another one; ``"both"`` if it holds columns of classes beside columns of values (rows of
            boxes, pairs of a time and an event); else ``"values"``.
        """
        target = self._targets[key]
        if target.joint_line or target.flag_line:
            return "classes"
        if not target.classes:
            return "values"
        return "both" if target.values - target.classes else "classes"

    def evidence(self, key: str) -> str:
        """Name the lines of code that the verdict on a target rests on; empty if no loss used it.

        Example:
            >>> y, logits = torch.tensor([0.0, 1.0]), torch.randn(2, 2, requires_grad=True)
            >>> with LabelUse({"y": y}) as use:
            ...     loss = torch.nn.functional.cross_entropy(logits, y.long())
            >>> use.evidence("y")  # doctest: +ELLIPSIS
            'read as classes by `long`...'
        """
        target = self._targets[key]
        line = target.class_line or target.flag_line
        parts = [f"read as classes by {line}"] if target.classes or target.flag_line else []
        if not parts and target.joint_line:
            parts.append(f"read together with another target by {target.joint_line}")
        if self.verdict(key) != "classes" and target.values:
            parts.append(f"used as values by {target.value_line}")
        return ", ".join(parts)

    @override
    def record(
        self, func: Any, args: Any, kwargs: Any, reads: Sequence[Read], made: list[Tensor], written: list[Tensor]
    ) -> None:
        name, read, results = function_name(func), [one.tensor for one in reads], [*made, *written]
        labels = [self._labels[tensor] for tensor in read if tensor in self._labels]
        trained = any(tensor.requires_grad for tensor in results)
        self._trace(name, read, results, trained=trained)
        predicted = [tensor for tensor in read if tensor.requires_grad or tensor in self._predictions]
        if not labels:
            if predicted and not trained:
                self._predictions.update(dict.fromkeys(results, True))
            return
        classes = frozenset().union(*(label.classes for label in labels))
        values = frozenset().union(*(_numbers(label.columns) for label in labels))
        line = next((label.line for label in labels if label.line), "")
        if trained:
            if name in _FLAGS or (name in _PRODUCTS and all(target.signs for target in self._of(values))):
                classes, line = classes | values, line or _place(name)
            self._note(name, values, classes, line)
            return
        if name not in _MOVES and any(tensor.dtype is not torch.bool for tensor in predicted):
            values = frozenset()  # a difference of prediction and target is no label
        moved = self._moved(func, name, args, kwargs, len(results)) if name in _MOVES and values else None
        for index, result in enumerate(results):
            columns: Tensor | frozenset[int] = values if moved is None else moved[index]
            if moved is None and values:
                same = [label.columns for label in labels if isinstance(label.columns, Tensor)]
                columns = same[0] if len(labels) == 1 and same and same[0].shape == result.shape else values
            held = classes
            if (not result.is_floating_point() or name in _DISCRETE) and values:
                line = line or _place(name)
                for target in self._of(values):  # a mean of zeros and ones is neither, for a metric either
                    target.flag_line = target.flag_line or (line if target.flags else "")
                held, columns = classes if in_torchmetrics() else classes | values, frozenset()
            self._labels[result] = _Label(columns, held, line)

    def _of(self, values: Iterable[int]) -> list[_Target]:
        """List the targets that some columns belong to."""
        return [target for target in self._targets.values() if not set(values).isdisjoint(target.numbers)]

    def _trace(self, name: str, read: list[Tensor], results: list[Tensor], *, trained: bool) -> None:
        """Note which targets the results come from, and which of these were read together."""
        found = {id(tensor): self._origins[tensor] for tensor in read if tensor in self._origins}
        if not found:
            return
        keys = frozenset().union(*(origin.keys for origin in found.values()))
        joint = {key: line for origin in found.values() for key, line in origin.joint.items()}
        different = len({origin.keys for origin in found.values()}) > 1
        if different and name not in _SUMS and not in_torchmetrics():
            labels = [t for t in read if id(t) in found and not t.requires_grad and t not in self._predictions]
            joint = (dict.fromkeys(keys, _place(name)) if labels else {}) | joint
        for result in results:
            self._origins[result] = _Origin(keys, joint)
        if trained:
            for key in self._targets.keys() & joint.keys():
                self._targets[key].joint_line = self._targets[key].joint_line or joint[key]

    def _moved(self, func: Any, name: str, args: Any, kwargs: Any, count: int) -> list[Tensor] | None:
        """Run an operation that only moves entries on the numbers of the columns; None if it cannot be done."""

        def numbered(value: Any) -> Any:
            if isinstance(value, (list, tuple)) and name in _JOINS:
                return [numbered(part) for part in value]
            label = self._labels.get(value) if isinstance(value, Tensor) else None
            if label is not None and isinstance(label.columns, Tensor):
                return label.columns
            if isinstance(value, Tensor) and name in _JOINS:
                return torch.full(value.shape, -1, device=value.device)
            return value

        first = args[0] if args else None
        label = self._labels.get(first) if isinstance(first, Tensor) else None
        if name not in _JOINS and (label is None or not isinstance(label.columns, Tensor)):
            return None
        try:
            moved = list(tensors(func(numbered(first), *args[1:], **kwargs)))
        except (RuntimeError, TypeError, AttributeError, IndexError):
            return None
        return moved if len(moved) == count and all(part.dtype is torch.int64 for part in moved) else None

    def _note(self, name: str, values: Iterable[int], classes: Iterable[int], line: str) -> None:
        classes = set(classes)
        if classes and in_torchmetrics():
            classes = set()
        for target in self._targets.values():
            seen = classes.intersection(target.numbers)
            if seen and not target.classes:
                target.class_line = line
            target.classes |= seen
            used = set(values).intersection(target.numbers)
            if used - target.classes and not target.value_line:
                target.value_line = _place(name)
            target.values |= used


def _columns(target: Tensor) -> tuple[Tensor, int]:
    """Give each column of a target a number: places in dimension 1 and the last one may hold classes or values."""
    if target.ndim < 2:
        return torch.zeros(target.shape, dtype=torch.int64, device=target.device), 1
    channels, last = target.shape[1], target.shape[-1]
    if target.ndim == 2:
        return torch.arange(channels, device=target.device).expand(target.shape), channels
    numbers = torch.arange(channels * last, device=target.device).view(1, channels, *[1] * (target.ndim - 3), last)
    return numbers.expand(target.shape), channels * last


def _numbers(columns: Tensor | frozenset[int]) -> frozenset[int]:
    if isinstance(columns, Tensor):
        return frozenset(torch.unique(columns).tolist()) - {-1}
    return columns


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def in_torchmetrics() -> bool:
    """Whether a metric is being computed: it compares and sorts, and its results are not trained on."""
    return any(str(frame.f_globals.get("__name__", "")).startswith("torchmetrics.") for frame in _frames())


def _place(name: str) -> str:
    """Name an operation, and the line of the user's code that it was called from."""
    name = name.strip("_")
    for frame in _frames():
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES):
            line = linecache.getline(file, frame.f_lineno).strip()
            line = line if len(line) <= _LINE else f"{line[:_LINE]}..."
            return f"`{name}`" + (f" in `{line}` ({Path(file).name}, line {frame.f_lineno})" if line else "")
    return f"`{name}`"
