"""The input and the target of a batch where the user names neither, and errors that say what to set.

The rules hold for nearly every batch of a kind; where a batch can be read in two ways, the error names both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.names import (
    INPUTS,
    TARGETS,
    is_mask,
    label_candidates,
    name_of,
    never_a_label,
    says_nothing,
)
from lightning_manifold_mixup._step.batch.tree import Key, children, item, joined

_IMAGES = ("image", "images", "img", "imgs", "pixel_values")


def find_target(batch: Any, inputs: Sequence[Key] = ()) -> Key:
    """Return the key of the target of a batch.

    Args:
        batch: what the dataloader gives.
        inputs: keys of the inputs, where the user has named them.

    Raises:
        ValueError: where it is not certain which one it is.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
        >>> find_target((x, y)), find_target({"image": x, "label": y, "id": y})
        (1, 'label')
    """
    keys = children(batch)
    named = [k for k in keys if name_of(str(k)) in TARGETS]
    if len(named) == 1:
        return joined(named)
    if named:
        raise _unclear("target", batch, f"{named} all could be it", [joined([k]) for k in named])
    if isinstance(batch, Tensor) or (len(keys) == 1 and isinstance(item(batch, keys[0]), Tensor)):
        raise ValueError(f"Expected a target in the batch, got one tensor. {target_is_input(batch)}")
    if loaders := _loaders(batch):
        raise ValueError(loaders)
    if _has_only_token_ids(batch):
        raise ValueError(
            "Expected a target in the batch, got token ids and what belongs to them, so the labels are made from the "
            "input (a causal or masked language model). Mixed labels need a place of their own: make them in the "
            "collate function, as transformers' DataCollatorForLanguageModeling does, and hand them on as "
            f"batch['labels']. The batch is:\n{batches.describe(batch)}"
        )
    given = {str(k).partition(".")[0] for k in inputs}
    others = [k for k in keys if (str(k) in given if given else name_of(str(k)) in INPUTS)]
    rest = _informative(batch, [k for k in keys if k not in others])
    rest = [k for k in rest if not never_a_label(k)] if len(rest) > 1 else rest
    if others and len(rest) == 1 and _may_be_the_target(batch, joined(rest), joined(others[:1])):
        return joined(rest)
    pair = _informative(batch, keys)
    if len(pair) == 2 and isinstance(batch, Sequence) and not given:
        _check_order([item(batch, k) for k in pair], pair)
        return joined(pair[1:])
    raise _unclear("target", batch, "none is known to be it", _suggestions(batch, inputs))


def beside_labels(batch: Any, target: Key) -> list[Key]:
    """List what is made of the labels, for a decoder to be given: ``decoder_input_ids``, ``decoder_attention_mask``."""
    parent = str(target).rpartition(".")[0]
    return [
        key
        for key, _ in batches.leaves(batch)
        if key != target and name_of(key).startswith("decoder_") and str(key).rpartition(".")[0] == parent
    ]


def find_input(batch: Any, targets: Sequence[Key] = ()) -> Key:
    """Return the key of the input of a batch.

    Args:
        batch: what the dataloader gives.
        targets: keys of the targets, which are not the input.

    Raises:
        ValueError: where it is not certain which one it is.

    Example:
        >>> find_input((1, 2)), find_input({"pixels": 1, "label": 2}), find_input((1, 2, 3), targets=[1, 2])
        (0, 'pixels', 0)
    """
    paths = [batches.resolve(batch, key, "target") for key in targets]
    keys = [k for k in children(batch) if (k,) not in paths]
    named = [k for k in keys if name_of(str(k)) in INPUTS]
    if len(named) == 1:
        return joined(named)
    if named:
        raise _unclear("input", batch, f"{named} all could be it", [joined([k]) for k in named])
    if not targets and len(keys) == 2 and isinstance(batch, Sequence):
        return joined(keys[:1])
    left = [k for k in keys if k not in {path[0] for path in paths} and name_of(str(k)) not in TARGETS]
    left = [k for k in _informative(batch, left) if not is_mask(str(k))] if len(left) > 1 else left
    if len(left) > 1 and isinstance(batch, Sequence):  # one number for each sample is an index or a weight
        left = [k for k in left if any(t.ndim > 1 for t in batches.tensors(item(batch, k)))]
    if len(left) == 1 and (targets or len(keys) <= 2):
        return joined(left)
    raise _unclear("input", batch, "none is known to be it", [])


def further_inputs(batch: Any, inputs: Sequence[Key], targets: Sequence[Key]) -> list[Key]:
    """List floating point tensors beside the inputs and targets that may be inputs, too.

    Example:
        >>> import torch
        >>> further_inputs({"x": torch.zeros(4, 3), "meta": torch.zeros(4, 2), "y": torch.zeros(4)}, ["x"], ["y"])
        ['meta']
    """
    known = {id(t) for key in (*inputs, *targets) for t in batches.tensors(batches.get(batch, key))}
    return [
        key
        for key, leaf in batches.leaves(batch)
        if leaf.is_floating_point() and leaf.ndim and id(leaf) not in known
        and not is_mask(key) and not name_of(key).endswith(("weight", "weights"))
    ]  # fmt: skip


def has_inputs_beside(batch: Any, targets: Sequence[Key]) -> bool:
    """Whether anything of the batch but its targets may be what the network is given."""
    paths = [".".join(map(str, batches.resolve(batch, key))) for key in targets]
    beside = [str(key) for key, _ in batches.leaves(batch)]
    beside = [key for key in beside if not any(f"{key}.".startswith(f"{path}.") for path in paths)]
    return not all(is_mask(key) or name_of(key) in TARGETS or says_nothing(key) for key in beside)


def target_is_input(batch: Any) -> str:
    """Say what to do where the target is the network's input as well."""
    return (
        "The target is the network's input as well (an autoencoder, a model that predicts the next step). It needs a "
        "place of its own, because the input stays plain while a hidden state and the target are mixed: let the "
        f"dataset return (x, x), and take the target from the second. The batch is:\n{batches.describe(batch)}"
    )


def why_no_labels(batch: Any, key: Key, value: Any) -> str:
    """Say why what is at ``key`` holds no tensor of labels, and what to do."""
    shown = f" The batch is:\n{batches.describe(batch)}"
    parts = value if isinstance(value, (list, tuple)) else ()
    if any(isinstance(part, Mapping) for part in parts):
        return (
            f"Expected targets in tensors with one entry for each sample, got a list with a dict for each image at "
            f"{key!r}: targets of object detection cannot be mixed. Set `target_key` if the batch has other targets, "
            f"or leave the callback out.{shown}"
        )
    first = parts[0] if parts else None
    if isinstance(first, (bool, int, float, str)) or hasattr(value, "__array__"):
        advice = "numbers for them" if isinstance(first, str) else "`torch.tensor(labels)` of them"
        return (
            f"Expected targets in a tensor, got a {batches.kind_of(value)} at {key!r}. Make {advice} in the collate "
            f"function.{shown}"
        )
    return (
        f"Expected targets in tensors with one entry for each sample at {key!r}, got {batches.kind_of(value)} without "
        f"such a tensor. Set `target_key` to the index or name of the target, or to a list of them.{shown}"
    )


def _unclear(role: str, batch: Any, finding: str, suggestions: Sequence[Key]) -> ValueError:
    several = list(suggestions) if len(suggestions) > 1 else [1, 2]
    what = "the loss reads several" if role == "target" else "there are several"
    likely = f" (here maybe {suggestions[0]!r})" if len(suggestions) == 1 else ""
    return ValueError(
        f"Expected to find the {role} in the batch, but {finding}. Set `{role}_key` to its index or name{likely}, or "
        f"to a list where {what}, as in `{role}_key={several}`; dots lead into nested batches, as in 'labelled.1'. "
        f"The batch is:\n{batches.describe(batch)}"
    )


def _suggestions(batch: Any, inputs: Sequence[Key]) -> list[Key]:
    found = list(inputs) or [k for k, _ in batches.leaves(batch) if name_of(k) in INPUTS]
    if not found and isinstance(batch, Sequence) and batch:
        found = [0]
    informative = _informative(batch, children(batch))
    if not found and len(informative) == 1:
        return [joined(informative)]
    rows = [len(t) for key in found for t in batches.tensors(batches.get(batch, key)) if t.ndim]
    named = [k for k, _ in batches.leaves(batch) if name_of(k) in TARGETS]
    if named or not rows:
        return named
    unnamed = [
        k for k, leaf in batches.leaves(batch) if tuple(leaf.shape) == (rows[0],) and not leaf.is_floating_point()
    ]
    return label_candidates(batch, rows[0], found) or [k for k in unnamed if k not in found]


def _informative(batch: Any, keys: Sequence[Any]) -> list[Any]:
    """List the parts of a batch that hold tensors, and not only identities, lengths or the like.

    A single part is listed, and both of a pair, whatever they are: what is wrong with them is said elsewhere.
    """
    parts = {k: item(batch, k) for k in keys}
    names = {k: [k] if isinstance(v, Tensor) else [key for key, _ in batches.leaves(v)] for k, v in parts.items()}
    informative = [k for k in keys if not all(map(_bookkeeping, names[k]))]
    pair = len(keys) == 2 and isinstance(batch, Sequence) and len(informative) < 2
    return list(keys) if pair or len(keys) == 1 else informative


def _bookkeeping(key: Key) -> bool:
    return never_a_label(key) and not is_mask(key) and name_of(key) not in INPUTS


def _may_be_the_target(batch: Any, key: Key, beside: Key) -> bool:
    """Whether the only other field beside the input is its target."""
    if never_a_label(key):
        return False
    if not is_mask(key):
        return True
    # A mask beside an image is a segmentation; beside anything else it may say which entries count.
    image, mask = batches.get(batch, beside), batches.get(batch, key)
    both = isinstance(image, Tensor) and isinstance(mask, Tensor)
    return both and name_of(beside) in _IMAGES and mask.ndim > 2 and mask.shape[-2:] == image.shape[-2:]


def _has_only_token_ids(batch: Any) -> bool:
    keys = [key for key, _ in batches.leaves(batch)]
    return any(name_of(k) == "input_ids" for k in keys) and all(never_a_label(k) or is_mask(k) for k in keys)


def _check_order(pair: Sequence[Any], keys: Sequence[Any]) -> None:
    first, second = pair
    for key, part, other in ((keys[1], second, first), (keys[0], first, second)):
        numbers = isinstance(other, Tensor) and other.ndim == 1 and not other.is_floating_point() and part is second
        inner = _pair_in(part) if numbers or not any(True for _ in batches.tensors(other)) else None
        if inner is not None:
            raise ValueError(
                f"Expected (input, target) pairs, got such a pair at {key!r}, beside {batches.kind_of(other)}. Set "
                f"`input_key='{key}.{inner[0]}', target_key='{key}.{inner[1]}'`."
            )
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return
    if first.ndim <= 1 and not first.is_floating_point() and second.ndim > 1 and second.is_floating_point():
        raise ValueError(
            f"Expected (input, target) pairs, got {batches.kind_of(first)} before {batches.kind_of(second)}: the two "
            "may be swapped. Set `input_key=1, target_key=0` if they are, `input_key=0, target_key=1` if not."
        )


def _loaders(batch: Any) -> str | None:
    """Say what to set if a batch looks like one of several loaders; None if it does not."""
    keys = children(batch)
    parts = [item(batch, k) for k in keys]
    if not keys or hasattr(batch, "node_types"):
        return None
    found = [(key, part, _pair_in(part)) for key, part in zip(keys, parts, strict=True)]
    if all(pair is not None and _is_number(batches.get(part, pair[1])) for _, part, pair in found):
        return (
            f"Expected the tensors of a whole batch, got {len(parts)} samples in a {type(batch).__name__}. Stack them "
            f"in the collate function of the data loader. The batch is:\n{batches.describe(batch)}"
        )
    if not all(len(children(part)) for part in parts) and not all(
        isinstance(batch, Mapping) and (pair is None or _in_rows(part, pair[0])) for _, part, pair in found
    ):
        return None  # an image, and labels in a pair
    pairs = [(f"{key}.{pair[0]}", f"{key}.{pair[1]}") for key, _, pair in found if pair is not None]
    other = ""
    if isinstance(batch, Sequence) and len(parts) == 2:
        if not _like_two_loaders(parts[0], parts[1], found[0][2]):
            return None
        other = " If the first is the input and the second the target, set `input_key=0, target_key=1`."
    if not pairs:
        return None
    inputs, targets = (list(column) if len(pairs) > 1 else column[0] for column in zip(*pairs, strict=True))
    own = ": each pair is mixed with partners of its own" if len(pairs) > 1 else ""
    return (
        f"Expected the input and the target of one batch, got {len(parts)} parts that look like batches of their own "
        f"(several dataloaders). Set `input_key={inputs!r}, target_key={targets!r}`{own}.{other} "
        f"The batch is:\n{batches.describe(batch)}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, Tensor) and value.ndim == 0)


def _in_rows(part: Any, key: Key) -> bool:
    """Whether there are samples rather than labels at a key: floats in two dimensions or more."""
    return any(t.is_floating_point() and t.ndim > 1 for t in batches.tensors(batches.get(part, key)))


def _pair_in(part: Any) -> tuple[Key, Key] | None:
    try:
        target = find_target(part)
        return find_input(part, [target]), target
    except ValueError:
        return None


def _like_two_loaders(one: Any, two: Any, pair: tuple[Key, Key] | None) -> bool:
    """Whether a pair of structures is two batches, rather than the inputs and the targets of one.

    Args:
        one: the first structure.
        two: the second.
        pair: input and target of the first, if they can be found in it.
    """
    if batches.structure(one) == batches.structure(two):
        return True
    if pair is not None:
        target = batches.get(one, pair[1])
        if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
            return True
    a, b = (next(batches.tensors(part), None) for part in (one, two))
    if a is None or b is None or not a.is_floating_point() or a.ndim < 2:
        return False
    return a.dtype == b.dtype and a.shape[1:] == b.shape[1:]
