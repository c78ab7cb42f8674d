"""A batch of any kind as a tree: its tensors with their keys, one part of it, and a copy with parts replaced.

Lists, tuples, named tuples, dataclasses, mappings, objects with attributes or slots, and what behaves like one of them:
``TensorDict``, tensorclasses, the batches of torch_geometric, ``BatchEncoding``, ``DictConfig``. None of these packages
is imported: the methods of an object tell what it is.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

Key = int | str
"""Where a part of a batch is: an index, a name, or indices and names joined by dots (``"labelled.1"``)."""

_ATOMS = (Tensor, str, bytes, int, float, complex, type(None), type, nn.Module, types.ModuleType, types.FunctionType)
_DEPTH = 8
"""How many levels of a batch are looked at: an object may refer to its owner."""
_LONG = 4
"""``structure`` ignores the length of a longer run of equal parts, which may be the size of the batch."""


def children(node: Any) -> Sequence[Any]:
    """List the keys of the parts of a batch, or of a part of it; none for a tensor, a number, a text.

    Example:
        >>> import torch
        >>> children({"image": 0, "label": 1}), list(children([5, 6])), children(torch.zeros(3))
        (['image', 'label'], [0, 1], ())
    """
    kind = type(node)
    if kind is tuple or kind is list:
        return range(len(node))
    if kind is dict:
        return list(node)
    if isinstance(node, _ATOMS) or hasattr(node, "__array__"):
        return ()
    if hasattr(node, "_fields"):
        return tuple(node._fields)
    if _is_hetero(node):
        return [*map(str, node.node_types), *map("__".join, node.edge_types)]
    if dataclasses.is_dataclass(node) and not _by_key(node):
        return [field.name for field in dataclasses.fields(node) if hasattr(node, field.name)]
    if _by_key(node):
        return list(node.keys())
    if isinstance(node, Sequence):
        return range(len(node))
    slots = [name for cls in kind.__mro__ for name in _slots(cls) if hasattr(node, name)]
    return [*getattr(node, "__dict__", {}), *slots]


def item(node: Any, part: Any) -> Any:
    """Return one part of a batch, by one of its ``children``."""
    if isinstance(part, int) or _by_key(node):
        return node[part]
    if _is_hetero(node):
        return node[_type(part)]
    return getattr(node, part)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors anywhere in a batch, or in a part of it."""
    if isinstance(tree, Tensor):
        yield tree
        return
    for _, leaf in _walk(tree, (), ()):
        yield leaf


def leaves(batch: Any) -> list[tuple[Key, Tensor]]:
    """List the tensors of a batch with their keys.

    Example:
        >>> import torch
        >>> [(key, tuple(leaf.shape)) for key, leaf in leaves({"a": (torch.zeros(2), "text"), "b": [torch.zeros(3)]})]
        [('a.0', (2,)), ('b.0', (3,))]
    """
    return [(joined(path), leaf) for path, leaf in _walk(batch, (), ())]


def get(batch: Any, key: Key, role: str = "value") -> Any:
    """Return the part of a batch at ``key``.

    Raises:
        ValueError: if there is none. The message says ``role`` and shows the batch.
    """
    for part in resolve(batch, key, role):
        batch = item(batch, part)
    return batch


def replaced(batch: Any, key: Key, value: Any) -> Any:
    """Return a batch of the same type with ``value`` at ``key``; the batch handed in is left as it is."""
    return substituted(batch, {resolve(batch, key): value})


def substituted(batch: Any, values: Mapping[tuple[Any, ...], Any]) -> Any:
    """Return a batch of the same type with other values at some paths; the batch handed in is left as it is.

    Args:
        batch: the batch.
        values: the new values, by the keys that lead to each (see ``resolve``).
    """
    if type(batch) in (tuple, list):  # as a rule
        parts = list(batch)
        for path, value in values.items():
            if len(path) > 1:
                break
            parts[path[0]] = value
        else:
            return parts if type(batch) is list else tuple(parts)
    direct: dict[Any, Any] = {}
    nested: dict[Any, dict[tuple[Any, ...], Any]] = {}
    for path, value in values.items():
        if len(path) == 1:
            direct[path[0]] = value
        else:
            nested.setdefault(path[0], {})[path[1:]] = value
    for part, inner in nested.items():
        direct[part] = substituted(direct.get(part, item(batch, part)), inner)
    return _with(batch, direct)


def without(batch: Any, keys: Sequence[Key]) -> Iterator[Tensor]:
    """Yield the tensors of a batch at other places than ``keys``."""
    excluded = [resolve(batch, key) for key in keys]
    return (leaf for path, leaf in _walk(batch, (), ()) if not any(path[: len(top)] == top for top in excluded))


def resolve(batch: Any, key: Key, role: str = "value") -> tuple[Any, ...]:
    """Return the path to a part of a batch, one of the ``children`` for each level.

    Raises:
        ValueError: if ``key`` is not in the batch. The message says ``role``, near misses, and shows the batch.

    Example:
        >>> resolve({"labelled": ("x", "y")}, "labelled.1")
        ('labelled', 1)
    """
    path: list[Any] = []
    node, rest = batch, _parts(key)
    while rest:
        known = children(node)
        if not path and key in known:  # a name that holds dots itself
            return (key,)
        names = {str(k): k for k in known}
        if rest[0] in names:
            part = names[rest[0]]
        elif hasattr(node, "_fields") and rest[0].isdigit() and int(rest[0]) < len(node):
            part = node._fields[int(rest[0])]
        else:
            close = difflib.get_close_matches(rest[0], list(names), 3) or list(names)[:10]
            missing = int(rest[0]) if rest[0].isdigit() else rest[0]
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(
                f"`{role}_key={key!r}` is not in the batch: no {missing!r} there.{hint} "
                f"The batch is:\n{describe(batch)}"
            )
        path.append(part)
        node, rest = item(node, part), rest[1:]
    return tuple(path)


def joined(path: Sequence[Any]) -> Key:
    """Return the key of a path; see ``resolve``."""
    return path[0] if len(path) == 1 and isinstance(path[0], int) else ".".join(map(str, path))


def getter(batch: Any, path: Sequence[Any]) -> Callable[[Any], Any]:
    """Return a function that takes the part at ``path`` from batches that are built like this one, without checks."""
    steps: list[Callable[[Any], Any]] = []
    node = batch
    for part in path:
        by_name = not isinstance(part, int) and not _by_key(node) and not _is_hetero(node)
        steps.append(attrgetter(part) if by_name else itemgetter(_type(part) if _is_hetero(node) else part))
        node = steps[-1](node)
    if len(steps) == 1:
        return steps[0]

    def take(batch: Any) -> Any:
        for step in steps:
            batch = step(batch)
        return batch

    return take


def structure(batch: Any, depth: int = _DEPTH) -> Any:
    """Return a hashable value that is equal for batches built alike: types, keys, dtypes, numbers of dimensions.

    Sizes do not count; nor does the length of a list with an entry for each sample.

    Example:
        >>> import torch
        >>> structure((torch.zeros(4, 2), torch.zeros(4))) == structure((torch.zeros(3, 2), torch.zeros(3)))
        True
    """
    kind = type(batch)
    if isinstance(batch, Tensor):
        return kind, batch.dtype, batch.ndim
    if (kind is tuple or kind is list) and depth and 0 < len(batch) <= _LONG:  # as a rule, and asked of each batch
        return kind, tuple([structure(part, depth - 1) for part in batch])
    if kind is dict and batch and depth:
        return kind, tuple(map(str, batch)), tuple([structure(part, depth - 1) for part in batch.values()])
    keys = children(batch) if depth else ()
    if not keys:
        return kind
    parts = tuple([structure(item(batch, key), depth - 1) for key in keys])
    if isinstance(keys, range):
        return kind, _runs(parts) if len(parts) > _LONG else parts
    return kind, tuple(map(str, keys)), parts


def describe(batch: Any, indent: str = "  ") -> str:
    """Show how a batch is built, one line for each part.

    Example:
        >>> import torch
        >>> print(describe({"image": torch.zeros(2, 3), "names": ["a", "b"], "meta": ["a", 1]}))
          'image': float32 tensor (2, 3)
          'names': list of 2 str
          'meta': list of 2
            0: str
            1: int
    """
    lines = []
    for key in list(children(batch))[:20]:
        part = item(batch, key)
        lines.append(f"{indent}{key!r}: {kind_of(part)}")
        if children(part) and not _alike(part) and len(indent) < 2 * _DEPTH:
            lines.append(describe(part, indent + "  "))
    return "\n".join(lines) or f"{indent}{kind_of(batch)}"


def kind_of(part: Any) -> str:
    """Say in a few words what a part of a batch is."""
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} tensor {tuple(part.shape)}"
    size = f" of {len(part)}" if isinstance(part, (Sequence, Mapping)) and not isinstance(part, (str, bytes)) else ""
    return type(part).__name__ + size + (f" {_alike(part)}" if _alike(part) else "")


def _alike(part: Any) -> str:
    """Name the type of the texts or numbers in a list of nothing else; empty for anything else."""
    kinds = {type(value) for value in part} if isinstance(part, (list, tuple)) else set()
    return kinds.pop().__name__ if len(kinds) == 1 and kinds <= {str, bool, int, float} else ""


def _walk(node: Any, path: tuple[Any, ...], around: tuple[int, ...]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(node, Tensor):
        yield path, node
    elif id(node) not in around:  # an object may refer to its owner
        for key in children(node):
            yield from _walk(item(node, key), (*path, key), (*around, id(node)))


def _with(node: Any, values: Mapping[Any, Any]) -> Any:
    kind = type(node)
    if isinstance(node, (tuple, list)) and kind in (tuple, list):
        parts = list(node)
        for part, value in values.items():
            parts[part] = value
        return parts if kind is list else tuple(parts)
    if hasattr(node, "_fields"):
        return node._replace(**values)
    # ``copy.copy`` of a tensorclass shares its values before tensordict 0.15: the user's own batch would change.
    new = node.clone(recurse=False) if "_tensordict" in getattr(node, "__dict__", ()) else copy.copy(node)
    for part, value in values.items():
        if isinstance(part, int) or _by_key(node):
            new[part] = value
        elif _is_hetero(node):
            new[_type(part)].update(value)  # the copy has stores of its own, and keeps them
        else:
            try:
                setattr(new, part, value)
            except AttributeError:  # a frozen dataclass: the copy is ours
                object.__setattr__(new, part, value)
    return new


@lru_cache(maxsize=256)
def _parts(key: Key) -> list[str]:
    return str(key).split(".")


def _runs(parts: Sequence[Any]) -> tuple[Any, ...]:
    """Shorten each long run of equal parts to one."""
    short: list[Any] = []
    start = 0
    for end in range(1, len(parts) + 1):
        if end == len(parts) or parts[end] != parts[start]:
            short += [("many", parts[start])] if end - start > _LONG else parts[start:end]
            start = end
    return tuple(short)


def _by_key(node: Any) -> bool:
    """Whether parts are taken by ``node[key]``: mappings, and the data of torch_geometric, whose type is none."""
    if isinstance(node, Mapping):  # some are dataclasses, too: the outputs of transformers
        return True
    if dataclasses.is_dataclass(node) or _is_hetero(node):
        return False
    return callable(getattr(node, "keys", None)) and hasattr(node, "__getitem__")


def _is_hetero(node: Any) -> bool:
    """Whether it is a graph with nodes and edges of several types, each of which has a store of its own."""
    return hasattr(node, "node_types") and hasattr(node, "edge_types")


def _type(part: str) -> Any:
    return tuple(part.split("__")) if "__" in part else part


def _slots(cls: type) -> Iterator[str]:
    names = vars(cls).get("__slots__", ())
    return (name for name in ([names] if isinstance(names, str) else names) if not name.startswith("__"))
