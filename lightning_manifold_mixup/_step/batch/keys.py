"""Where inputs, targets and masks are in a batch: by the keys that the user gives, or found (``finding.py``).

The answer, ``Places``, is kept for batches that are built alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.finding import (
    beside_labels,
    find_input,
    find_target,
    further_inputs,
    has_inputs_beside,
    target_is_input,
    why_no_labels,
)
from lightning_manifold_mixup._step.batch.names import attention_masks, row_masks
from lightning_manifold_mixup._step.batch.places import Group as Group
from lightning_manifold_mixup._step.batch.places import Places as Places
from lightning_manifold_mixup._step.batch.tree import Key

KeyOrKeys = Key | Sequence[Key] | None
"""What a user writes: an index, a name, a list or tuple of those (of OmegaConf too), or None to have it found."""

_REMEMBERED = 32


class Keys:
    """Where a user says that the inputs, the targets and the masks of a batch are.

    Args:
        input_key: an index, a name (dots lead into nested batches: ``"labelled.0"``), or a list of those. None finds
            it: in a pair the first is the input and the second the target; otherwise it goes by the usual names.
        target_key: likewise.
        mask_key: likewise for attention masks. None finds ``attention_mask``.

    Raises:
        TypeError: for anything else.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
        >>> places = Keys().locate({"image": x, "label": y})
        >>> places.inputs, places.targets, places.samples({"image": x, "label": y})
        (('image',), ('label',), 4)
        >>> Keys(target_key=[1, 2]).locate((x, y, y)).targets
        (1, 2)
    """

    def __init__(self, input_key: KeyOrKeys = None, target_key: KeyOrKeys = None, mask_key: KeyOrKeys = None) -> None:
        self.inputs = _listed(input_key, "input_key")
        self.targets = _listed(target_key, "target_key")
        self.masks = _listed(mask_key, "mask_key")
        self._found: dict[Any, Places] = {}

    def locate(self, batch: Any, batch_dim: int | None = None) -> Places:
        """Find everything in a batch; the answer is kept for batches that are built alike.

        Args:
            batch: what the dataloader gives.
            batch_dim: the dimension of hidden states that counts the samples, if the user has said so. Targets that
                are as long as the input in dimensions 0 and 1 are time-major then, too.

        Raises:
            ValueError: where it cannot tell, or a key is not in the batch. The message says what to set, and shows the
                batch.
            TypeError: if the target is no tensor or structure of tensors.
        """
        built = batches.structure(batch), batch_dim
        places = self._found.get(built)
        if places is None:
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            places = self._found[built] = self._locate(batch, batch_dim)
        return places

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_found": {}}

    def _locate(self, batch: Any, batch_dim: int | None) -> Places:
        paths: dict[Key, tuple[Any, ...]] = {}

        def known(keys: Sequence[Key], role: str) -> tuple[Key, ...]:
            keys = _given(batch, keys)
            paths.update((key, batches.resolve(batch, key, role)) for key in keys)
            return tuple(keys)

        targets = known(self.targets or [], "target")
        inputs = known(self.inputs or [], "input")
        if not targets:
            found = find_target(batch, inputs)
            targets = known([found, *beside_labels(batch, found)], "target")
        problem = None
        if not inputs:
            if not has_inputs_beside(batch, targets):
                raise ValueError(f"Expected an input beside the target {_shown(targets)}. {target_is_input(batch)}")
            try:
                inputs = known([find_input(batch, targets)], "input")
                problem = _several_inputs(batch, inputs, targets)
            except ValueError as error:
                problem = str(error)
        groups = _groups(batch, inputs, targets)
        if groups is None:
            groups, grouped = [(inputs, targets)], False
        else:
            grouped = True
            inputs = known([key for some, _ in groups for key in some], "input")
            problem = None
        problem = problem or _unmixable_input(batch, inputs)
        target_dim = 0
        with_masks = []
        for some_inputs, some_targets in groups:
            labels = _labels(batch, some_targets)
            states = [t for key in some_inputs for t in batches.tensors(batches.get(batch, key))]
            target_dim = max(target_dim, _target_dim(labels, states, batch_dim))
            n = _number(batch, some_targets, labels, target_dim)
            if self.targets is None:
                _check_rows(batch, some_targets[0], n, states)
            parent = _parent(some_targets[0])
            masks = self.masks if self.masks is not None else attention_masks(batch, n)
            own = [key for key in masks if not grouped or _parent(key) == parent]
            with_masks.append(Group(some_inputs, some_targets, known(own, "mask")))
        rows = [] if grouped else [key for key in row_masks(batch, n) if key not in targets]
        row_mask = next((key for key in rows if str(key).endswith("train_mask")), rows[0] if len(rows) == 1 else None)
        known([] if row_mask is None else [row_mask], "mask")
        return Places(
            inputs=inputs,
            targets=targets,
            masks=tuple(key for group in with_masks for key in group.masks),
            groups=tuple(with_masks),
            target_dim=target_dim,
            row_mask=row_mask,
            input_problem=problem,
            _paths=paths,
            _getters={key: batches.getter(batch, path) for key, path in paths.items()},
        )


def _listed(keys: KeyOrKeys, name: str) -> list[Key] | None:
    """Check and copy what the user has written."""
    if keys is None:
        return None
    listed = list(keys) if isinstance(keys, Sequence) and not isinstance(keys, (str, bytes)) else [keys]
    if not listed or any(isinstance(key, bool) or not isinstance(key, (int, str)) for key in listed):
        raise TypeError(
            f"Expected `{name}` to be an index, a name or a list of those (or None, to have it found), got {keys!r}."
        )
    if len(set(map(str, listed))) < len(listed):
        raise TypeError(f"Expected each key once in `{name}`, got {keys!r}.")
    return listed  # type: ignore[return-value]


def _several_inputs(batch: Any, inputs: Sequence[Key], targets: Sequence[Key]) -> str | None:
    others = further_inputs(batch, inputs, targets)
    if not others:
        return None
    return (
        f"Expected one floating point input, got {_shown([*inputs, *others])}. Set `input_key={inputs[0]!r}` if the "
        f"others do not enter the network, or list all that do, as in `input_key={[*inputs, *others]}`; list those "
        f"that are labels in `target_key`. The batch is:\n{batches.describe(batch)}"
    )


def _unmixable_input(batch: Any, inputs: Sequence[Key]) -> str | None:
    for key in inputs:
        if _packed(batches.get(batch, key)):
            return (
                f"'input' is in S, but the input at {key!r} is a packed sequence: its rows are the time steps of all "
                "samples, sorted by length. Take 'input' out of `layers`, or hand the padded tensor and the lengths, "
                "and pack inside the step."
            )
    return None


def _packed(value: Any) -> bool:
    return hasattr(value, "batch_sizes") and hasattr(value, "sorted_indices")


def _groups(
    batch: Any, inputs: Sequence[Key], targets: Sequence[Key]
) -> list[tuple[tuple[Key, ...], tuple[Key, ...]]] | None:
    """Pair inputs and targets by the part of the batch that they are in; None if they are of one batch."""
    parents = [_parent(key) for key in targets]
    if len(set(parents)) < 2 or "" in parents:
        return None
    groups: list[tuple[tuple[Key, ...], tuple[Key, ...]]] = []
    for parent in dict.fromkeys(parents):
        own = tuple(key for key in targets if _parent(key) == parent)
        beside = tuple(key for key in inputs if _parent(key) == parent)
        if not beside and inputs:
            return None
        if not beside:
            try:
                inner = [key[len(parent) + 1 :] for key in map(str, own)]
                beside = (f"{parent}.{find_input(batches.get(batch, parent), inner)}",)
            except ValueError:
                return None
        groups.append((beside, own))
    return groups


def _given(batch: Any, keys: Sequence[Key]) -> list[Key]:
    """Leave out keys of data loaders that have come to their end: ``CombinedLoader`` puts None in their place."""
    parts = {str(part): part for part in batches.children(batch)}
    ended = {name for name, part in parts.items() if batches.item(batch, part) is None}
    given = [key for key in keys if str(key).partition(".")[0] not in ended or "." not in str(key)]
    return given or list(keys)


def _parent(key: Key) -> str:
    return str(key).rpartition(".")[0]


def _labels(batch: Any, targets: Sequence[Key]) -> list[Tensor]:
    """Return the tensors of the targets.

    Raises:
        TypeError: if one of the targets holds none.
    """
    labels: list[Tensor] = []
    for key in targets:
        value = batches.get(batch, key, "target")
        if _packed(value):
            raise TypeError(
                f"Expected targets with one row for each sample, got a packed sequence at {key!r}: its rows are the "
                "time steps of all samples, sorted by length. Hand the padded tensor and the lengths, and pack inside "
                "the step."
            )
        detection = isinstance(value, (list, tuple)) and any(isinstance(part, Mapping) for part in value)
        found = [] if detection else list(batches.tensors(value))
        if not found:
            raise TypeError(why_no_labels(batch, key, value))
        labels += found
    return labels


def _target_dim(labels: Sequence[Tensor], inputs: Sequence[Tensor], batch_dim: int | None) -> int:
    """Return the dimension of the targets that counts the samples."""
    if not batch_dim or batch_dim < 0 or any(label.ndim <= batch_dim for label in labels):
        return 0
    end = batch_dim + 1
    time_major = not inputs or any(state.shape[:end] == labels[0].shape[:end] for state in inputs)
    return batch_dim if time_major else 0


def _number(batch: Any, targets: Sequence[Key], labels: Sequence[Tensor], dim: int) -> int:
    """Return the number of samples.

    Raises:
        ValueError: if the targets hold different numbers of samples, or none.
    """
    rows = {label.shape[dim] if label.ndim > dim else None for label in labels}
    if rows == {None} and len(labels) > 1:
        raise ValueError(
            f"Expected targets in a tensor with one row for each sample at {_shown(targets)}, got {len(labels)} "
            "tensors with one number each. Make `torch.stack(labels)` of them in the collate function."
        )
    n = rows.pop()
    if n is None or rows:
        raise ValueError(
            f"Expected targets of one number of samples in dimension {dim} at {_shown(targets)}, got shapes "
            f"{', '.join(str(tuple(label.shape)) for label in labels)}. The batch is:\n{batches.describe(batch)}"
        )
    return n


def _check_rows(batch: Any, target: Key, n: int, inputs: Sequence[Tensor]) -> None:
    """Refuse targets whose rows are not samples: boxes or labels of all samples, one after the other."""
    first = next((state for state in inputs if state.ndim), None)
    if len({len(state) for state in inputs if state.ndim}) > 1 and n == len(inputs):  # one tensor for each sample
        return
    if first is None or n <= len(first) or n in first.shape[:2]:
        return
    if any("edge_index" in str(key) for key, _ in batches.leaves(batch)):  # the targets may be those of edges
        return
    raise ValueError(
        f"Expected a target with one row for each of the {len(first)} samples, got {n} rows at {target!r}. Labels of "
        "all samples in one tensor, one after the other (boxes of YOLO, words of CTC), cannot be mixed: pad them to "
        "one row for each sample. If these are not the targets, set `target_key`. The batch is:\n"
        f"{batches.describe(batch)}"
    )


def _shown(keys: Sequence[Key]) -> str:
    return ", ".join(map(repr, keys))
