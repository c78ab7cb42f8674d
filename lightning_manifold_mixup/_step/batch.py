"""Where the input and the target are in a batch, whatever its structure; and a batch with one of them replaced."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Key = int | str

INPUT_NAMES = (
    "input", "inputs", "x", "image", "images", "img", "data", "features", "pixel_values", "input_values", "input_ids",
)  # fmt: skip
TARGET_NAMES = ("target", "targets", "y", "label", "labels")


def find(batch: Any, role: str, key: Key | None) -> Key:
    """The key of the input or the target of a batch.

    Args:
        batch: what the dataloader gives: a list, tuple, named tuple, dataclass, mapping, or an object with attributes.
        role: ``"input"`` or ``"target"``.
        key: what the user said: an index, a name, or names and indices joined by dots for a nested batch
            (``"labelled.1"``). None finds it: in a pair the first is the input, the second the target; otherwise it
            goes by the usual names.

    Raises:
        ValueError: where it cannot tell, or where ``key`` is not in the batch. The message shows the batch.

    Example:
        >>> find(("x", "y"), "target", None), find({"image": 0, "label": 1, "id": 2}, "target", None)
        (1, 'label')
    """
    if key is not None:
        get(batch, key, role)
        return key
    keys = list(_keys(batch))
    names, others = (INPUT_NAMES, TARGET_NAMES) if role == "input" else (TARGET_NAMES, INPUT_NAMES)
    found = [k for k in keys if str(k).lower() in names]
    if not found and len(keys) == 2:  # of two fields, one of which is known to be the other role
        found = [k for k in keys if any(str(o).lower() in others for o in keys if o != k)]
    if not found and len(keys) == 2 and isinstance(batch, Sequence):
        found = [keys[0] if role == "input" else keys[1]]
    if len(found) == 1:
        return found[0]
    which = f"{found} all could be" if found else "none is known to be"
    raise ValueError(
        f"Expected to find the {role} in the batch, but {which} it. Set `{role}_key` to its index or name "
        f"(dots for nested batches, as in 'labelled.1'). The batch is:\n{describe(batch)}"
    )


def get(batch: Any, key: Key, role: str = "value") -> Any:
    """The part of the batch at ``key``."""
    for part in _path(key):
        keys = list(_keys(batch))
        if part not in keys and not (isinstance(batch, tuple) and part in range(len(batch))):
            close = difflib.get_close_matches(str(part), [str(k) for k in keys], 3) or [str(k) for k in keys]
            raise ValueError(
                f"`{role}_key={key!r}` is not in the batch: no {part!r} there. Did you mean {' or '.join(close)}? "
                f"The batch is:\n{describe(batch)}"
            )
        batch = _item(batch, part)
    return batch


def replaced(batch: Any, key: Key, value: Any) -> Any:
    """A batch of the same type with ``value`` at ``key``; the batch handed in is left as it is."""
    part, *rest = _path(key)
    if rest:
        value = replaced(_item(batch, part), ".".join(map(str, rest)), value)
    if hasattr(batch, "_fields"):
        return (
            batch._replace(**{part: value}) if isinstance(part, str) else type(batch)(*_substituted(batch, part, value))
        )
    if isinstance(batch, tuple):
        return type(batch)(_substituted(batch, part, value))
    new = copy.copy(batch)
    if isinstance(batch, Mapping) or isinstance(part, int):
        new[part] = value
    else:
        object.__setattr__(new, part, value)  # frozen dataclasses too: the copy is ours
    return new


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors anywhere in a batch or a part of it."""
    if isinstance(tree, Tensor):
        yield tree
    elif not isinstance(tree, (str, bytes)):
        for key in _keys(tree):
            yield from tensors(_item(tree, key))


def without(batch: Any, keys: Sequence[Key]) -> Iterator[Tensor]:
    """The tensors of a batch other than those at ``keys``."""
    excluded = {id(tensor) for key in keys for tensor in tensors(get(batch, key))}
    return (tensor for tensor in tensors(batch) if id(tensor) not in excluded)


def describe(batch: Any, indent: str = "  ") -> str:
    """The structure of a batch, one line for each part.

    Example:
        >>> import torch
        >>> print(describe({"image": torch.zeros(2, 3), "meta": ["a", 1]}))
          'image': float32 tensor (2, 3)
          'meta': list of 2
            0: str
            1: int
    """
    if isinstance(batch, Tensor):
        return f"{indent}{_kind(batch)}"
    lines = []
    for key in list(_keys(batch))[:20]:
        item = _item(batch, key)
        lines.append(f"{indent}{key!r}: {_kind(item)}")
        if not isinstance(item, (str, bytes, Tensor)) and any(True for _ in _keys(item)):
            lines.append(describe(item, indent + "  "))
    return "\n".join(lines) or f"{indent}{_kind(batch)}"


def _kind(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')} tensor {tuple(item.shape)}"
    size = f" of {len(item)}" if isinstance(item, (Sequence, Mapping)) and not isinstance(item, (str, bytes)) else ""
    return type(item).__name__ + size


def _path(key: Key) -> list[Key]:
    return [int(part) if part.isdigit() else part for part in key.split(".")] if isinstance(key, str) else [key]


def _keys(batch: Any) -> Iterator[Key]:
    if type(batch) in (list, tuple):  # nearly every batch; the abstract classes below are slow to ask
        yield from range(len(batch))
    elif hasattr(batch, "_fields"):
        yield from batch._fields
    elif dataclasses.is_dataclass(batch):
        yield from (field.name for field in dataclasses.fields(batch))
    elif isinstance(batch, Mapping):
        yield from batch.keys()
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        yield from range(len(batch))
    elif not isinstance(batch, Tensor):
        yield from getattr(batch, "__dict__", {})


def _item(batch: Any, part: Key) -> Any:
    return batch[part] if isinstance(batch, Mapping) or isinstance(part, int) else getattr(batch, part)


def _substituted(batch: Sequence[Any], part: Key, value: Any) -> Iterator[Any]:
    return (value if index == part else item for index, item in enumerate(batch))
