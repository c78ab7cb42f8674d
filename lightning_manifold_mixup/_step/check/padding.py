"""Padding in the self-check: the mask of a sample belongs to its length, not to what is mixed.

The swap oracle permutes states, but the network has read the mask of each sample before layer k. So the oracle is asked
about a batch in which no position is masked. A network that makes its mask from the tokens cannot be given the union of
two masks: that is a reason to warn, not to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.names import marks_padding
from lightning_manifold_mixup._step.batch.places import Places
from lightning_manifold_mixup._step.check.self_check import Verdict, swap
from lightning_manifold_mixup._step.check.trials import Mixes, Trials
from lightning_manifold_mixup._step.step import Site

# Tokens that are tried as padding: the most frequent ones at the ends of the samples.
_CANDIDATES = 3


def all_seen(trials: Trials, places: Places) -> Trials:
    """Return trials on a batch with one mask for all samples: the union of all."""
    masks = {key: places.of(trials.call.batch, key) for key in places.masks}
    values = {
        key: (mask.amin if marks_padding(key) else mask.amax)(0, keepdim=True).expand_as(mask)
        for key, mask in masks.items()
    }
    return trials.on(places.replace(trials.call.batch, values)) if values else trials


def mask_from_tokens(trials: Trials, site: Site, mixes: Mixes) -> str | None:
    """Say which part of the batch the step makes a mask of padding from; None if that does not explain the failure.

    It explains the failure if the swap oracle passes once that token is replaced by another one.

    Args:
        trials: the step.
        site: the layer at which the swap oracle has failed.
        mixes: the permutation it failed with.
    """
    for key, token, filled in _without_padding(trials.call.batch, site, len(mixes[0].partners)):
        others = trials.on(batches.replaced(trials.call.batch, key, filled))
        try:
            plain_run = others.run()
            finding = swap(others, site, mixes, plain_run, None)
        except Exception:  # a part that cannot be changed is not the one that is looked for
            continue
        if plain_run.loss is not None and finding.verdict is Verdict.PASSED:
            return (
                f"at {site.layer!r}, the mask of a mixed state is that of the one sample, because the step makes it "
                f"from batch[{key!r}] (where that is not {token}): what the state holds of a longer partner is not "
                "seen. Hand the mask on as batch['attention_mask'], and it becomes the union of both"
            )
    return None


def _without_padding(batch: Any, site: Site, n: int) -> Iterator[tuple[Any, int, Tensor]]:
    """Yield the tokens of a batch without what may be padding: key, that token, and the tensor with another one."""
    known = site.places.mixed
    for key, leaf in batches.leaves(batch):
        if str(key) in known or leaf.ndim != 2 or len(leaf) != n or leaf.is_floating_point() or leaf.is_complex():
            continue
        tokens, counts = torch.unique(torch.cat([leaf[:, 0], leaf[:, -1]]), return_counts=True)
        for token in tokens[counts.argsort(descending=True)][:_CANDIDATES]:
            others = leaf[leaf != token]
            filled = torch.where(leaf == token, others.flatten()[:1], leaf) if len(others) else leaf
            if len(others) < leaf.numel() and bool((filled != filled[:1]).any()):  # else labels would not show
                yield key, int(token), filled
