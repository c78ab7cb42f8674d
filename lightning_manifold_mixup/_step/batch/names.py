"""What the name of a tensor says about its part in a batch: an input, a label, a mask, or none of these.

Names only: nothing here looks at values. The rules err on the side of asking the user.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.tree import Key

INPUTS = (
    "input", "inputs", "x", "image", "images", "img", "imgs", "data", "features", "pixel_values", "input_values",
    "input_features", "input_ids", "inputs_embeds",
)  # fmt: skip
TARGETS = ("target", "targets", "y", "label", "labels")
_MASK = re.compile(r"(^|.*_)masks?$|^mask_.*|.*(train|val|test|pad|padding)mask$")
# What a decoder is given is made from the labels, and so is its mask.
_ATTENTION_MASK = re.compile(r"^(?!decoder_)((.+_)?(attention|attn)|input|pixel)_mask$")
_LABEL_IDS = re.compile(r"^(labels?|targets?|class|cls|category)_(ids?|idx|index)$|.*_(labels?|targets?)$")
_NO_INPUT = re.compile(
    r"(id|ids|idx|idxs|index|indices|uid|uuid)|(token_type|position|segment)_ids|(^|.*_)(len|lens|length|lengths|weight|"
    r"weights|path|file|filename|ptr|batch)"
)
_LENGTH = re.compile(r"(^|.*_)(len|lens|length|lengths)$")
# Beside masks: lengths, identities, indices, weights, and the bookkeeping of graph batches.
_NO_LABEL = re.compile(
    r"(^|.*_)(len|lens|length|lengths|id|ids|idx|idxs|index|indexes|indices|uid|uuid|weight|weights|pos|ptr|batch|path|"
    r"file|filename)$|^(num|n|edge|adj)_.*"
)


def name_of(key: Key) -> str:
    """Return the last part of a key, in lower case."""
    return str(key).rpartition(".")[2].lower()


def is_mask(key: Key) -> bool:
    """Whether a name is that of a mask: ``mask``, ``attention_mask``, ``train_mask``.

    Example:
        >>> is_mask("attention_mask"), is_mask("label")
        (True, False)
    """
    return _MASK.fullmatch(name_of(key)) is not None and _LABEL_IDS.fullmatch(name_of(key)) is None


def says_nothing(key: Key) -> bool:
    """Whether a name rules out an input of the network: the number of a sample, its length or weight, token types.

    Example:
        >>> says_nothing("idx"), says_nothing("token_type_ids"), says_nothing("user_id")
        (True, True, False)
    """
    return _NO_INPUT.fullmatch(name_of(key)) is not None


def is_length(key: Key) -> bool:
    """Whether a name is that of lengths of samples: ``lengths``, ``audio_len``.

    Example:
        >>> is_length("audio_len"), is_length("label")
        (True, False)
    """
    return _LENGTH.fullmatch(name_of(key)) is not None


def marks_padding(key: Key) -> bool:
    """Whether a mask is true at padding (``key_padding_mask``), and not at the content."""
    return "pad" in name_of(key)


def never_a_label(key: Key) -> bool:
    """Whether a name rules out a label: masks other than ``mask``, lengths, ids, indices, weights, token ids.

    Example:
        >>> [name for name in ("label", "color", "mask", "loss_mask", "label_lengths", "id") if never_a_label(name)]
        ['loss_mask', 'label_lengths', 'id']
    """
    name = name_of(key)
    if _LABEL_IDS.fullmatch(name):
        return False
    return (is_mask(key) and name not in ("mask", "masks")) or name in INPUTS or _NO_LABEL.fullmatch(name) is not None


def label_candidates(batch: object, n: int, inputs: Sequence[Key] = ()) -> list[Key]:
    """List the tensors of a batch that could be labels of its samples.

    Args:
        batch: the batch.
        n: the number of samples.
        inputs: keys of the inputs, which are none; nor is a second view of one of them.

    Returns:
        Keys, dots inside nested batches.

    Example:
        >>> batch = {"image": torch.zeros(4, 3), "label": torch.zeros(4), "color": torch.zeros(4), "id": torch.zeros(4)}
        >>> label_candidates(batch, n=4, inputs=["image"])
        ['label', 'color']
    """
    views = [leaf for key in inputs for leaf in batches.tensors(batches.get(batch, key))]
    return [
        key
        for key, leaf in batches.leaves(batch)
        if leaf.ndim and len(leaf) == n and not never_a_label(key) and not any(_same_kind(leaf, view) for view in views)
    ]


def attention_masks(batch: object, n: int) -> list[Key]:
    """List the attention masks of a batch: (n, length) tensors that go by the usual names."""
    return [
        key
        for key, leaf in batches.leaves(batch)
        if _ATTENTION_MASK.fullmatch(name_of(key)) and leaf.ndim >= 2 and len(leaf) == n
    ]


def row_masks(batch: object, n: int) -> list[Key]:
    """List the masks that say which samples are trained on (``train_mask`` of a graph's nodes): (n,) bool tensors."""
    return [
        key for key, leaf in batches.leaves(batch) if is_mask(key) and leaf.dtype is torch.bool and leaf.shape == (n,)
    ]


def _same_kind(leaf: Tensor, view: Tensor) -> bool:
    """Whether a tensor is an input, or another view of the samples that it shows."""
    return leaf is view or (leaf.ndim > 1 and leaf.is_floating_point() and leaf.shape == view.shape)
