"""Names what reaches the loss around layer k and the targets, once the swap oracle has found that something does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_manifold_mixup._step.batch import tree as batches
from lightning_manifold_mixup._step.batch.names import is_length, is_mask
from lightning_manifold_mixup._step.check.self_check import Comparison
from lightning_manifold_mixup._step.check.trials import Mixes, Outcome, Trials
from lightning_manifold_mixup._step.mix.hooks import TargetHook
from lightning_manifold_mixup._step.step import Site
from lightning_manifold_mixup.layers import INPUT, named_layers


def explain(trials: Trials, site: Site, mixes: Mixes, plain_run: Outcome) -> str:
    """Say in a sentence or two what else reaches the loss, and what to do about it.

    Args:
        trials: the step.
        site: the layer at which the swap oracle has failed.
        mixes: the permutation it failed with, as a draw with lam 0.
        plain_run: the step on the batch as it is.
    """
    wrong = trials.run(site, states=mixes)

    def restored(where: Site = site, **conditions: Any) -> bool:
        conditions = {"states": mixes, "labels": mixes, "how": "partners"} | conditions
        try:
            outcome = trials.run(where, **conditions)
        except Exception:  # a part that cannot be permuted is not the one that is looked for
            return False
        return outcome.loss is not None and Comparison(outcome, plain_run, wrong).same_loss

    places, batch = site.places, trials.call.batch
    targets = list(places.targets)
    others = list(_others(batch, site, len(mixes[0].partners)))
    found = [key for key in others if restored(also=(key,))]
    if not found and len(others) > 1 and restored(also=others):
        found = others
    if found:
        proposal = [*targets, *found]
        text = (
            f"The loss also reads {_parts(found)} of the batch. If that is a label, or goes with the labels (a weight, "
            f"say), set `target_key={proposal}`"
        )
        if any(is_mask(key) or is_length(key) for key in found):
            text += (
                f"; if it is a mask or the length of the samples, of which a mixed one needs the larger, "
                f"`mask_key={[*places.masks, *found]}`"
            )
        if site.layer == INPUT:
            text += f"; if it is an input, `input_key={[*places.inputs, *found]}`"
        return text + "."
    if site.layer != INPUT and _labels_enter_before(trials, site, mixes):
        views = any(_is_float(batches.get(batch, key)) for key in targets)
        nothing = " If they are a second view of the samples and no labels, mix at 'input' alone." if views else ""
        return (
            f"The targets also enter the network before {site.layer!r} (as an input, or in teacher forcing), so its "
            "state depends on them. Mix at a layer before they enter, or hand them to the network and to the loss "
            f"under two keys of the batch.{nothing}"
        )
    for dim in (0, 1):
        if site.layer != INPUT and restored(dataclasses.replace(site, batch_dim=dim, dims={})):
            return f"The samples are in dimension {dim} of the state at {site.layer!r}: set `batch_dim={dim}`."
    module = next((name for name in _modules_aside(trials, site) if restored(around=_permuting(name, mixes))), None)
    if module is not None:
        return (
            f"The loss also reads what {module!r} makes of the batch, which is a target of its own (a teacher, an "
            f"encoder). Set `target_modules=[{module!r}]` to have it mixed with the same draw."
        )
    float_inputs = [key for key in places.inputs if _is_float(batches.get(batch, key))]
    if site.layer != INPUT and float_inputs and _whole_batch_permuted(trials, site, mixes, plain_run, wrong):
        return (
            f"The loss also reads the input {_parts(float_inputs)} past this layer: as a target (a reconstruction), "
            "through a second network, or in an operation between functions. If it is a target, set "
            f"`target_key={[*targets, *float_inputs]}` and `input_key={float_inputs}`; otherwise mix at 'input' alone."
        )
    return (
        "No single part of the batch explains it: the order of the samples matters, as where they are sorted or paired "
        "by position, where a buffer is read by position, or where the batch is in another dimension (`batch_dim`). "
        "Take this layer out of `layers`, or compute that part on the unmixed batch (`with unmixed():`)."
    )


def _others(batch: Any, site: Site, n: int) -> Iterator[Any]:
    known, inputs = site.places.mixed, frozenset(map(str, site.places.inputs))
    for key, leaf in batches.leaves(batch):
        around = known | inputs if leaf.is_floating_point() else known  # a label may be beside the samples of an input
        inside = any(str(key).startswith(f"{other}.") for other in around)
        if str(key) not in known | inputs and not inside and leaf.ndim and len(leaf) == n:
            yield key


def _labels_enter_before(trials: Trials, site: Site, mixes: Mixes) -> bool:
    """Whether the state at layer k changes with the targets alone."""
    seen: list[list[Tensor]] = []

    def watch(ghost: nn.Module, stack: ExitStack) -> None:
        seen.append([])

        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[-1].extend(tensor.detach() for tensor in batches.tensors(output))

        stack.callback(named_layers(ghost)[site.layer].register_forward_hook(note).remove)

    trials.run(site, around=watch)
    trials.run(site, labels=mixes, how="partners", around=watch)
    before, after = seen
    return len(before) != len(after) or any(
        a.shape != b.shape or not torch.allclose(a, b, equal_nan=True) for a, b in zip(before, after, strict=True)
    )


def _modules_aside(trials: Trials, site: Site) -> Iterator[str]:
    """Return the outermost modules with weights that neither hold layer k nor are held by it."""
    found: list[str] = []
    for name, module in named_layers(trials.module).items():
        around = site.layer == name or site.layer.startswith(f"{name}.") or name.startswith(f"{site.layer}.")
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not around and not inside and any(True for _ in module.parameters()):
            found.append(name)
            yield name


def _permuting(name: str, mixes: Mixes) -> Any:
    def around(ghost: nn.Module, stack: ExitStack) -> None:
        hook = TargetHook()
        hook.arm(mixes)
        stack.callback(named_layers(ghost)[name].register_forward_hook(hook).remove)

    return around


def _whole_batch_permuted(trials: Trials, site: Site, mixes: Mixes, plain_run: Outcome, wrong: Outcome) -> bool:
    n = len(mixes[0].partners)
    leaves, known = batches.leaves(trials.call.batch), site.places.mixed
    rest = [k for k, leaf in leaves if str(k) not in known and leaf.ndim and len(leaf) == n]
    try:
        outcome = trials.run(site, labels=mixes, how="partners", also=rest)
    except Exception:
        return False
    return outcome.loss is not None and Comparison(outcome, plain_run, wrong).same_loss


def _is_float(value: Any) -> bool:
    return any(tensor.is_floating_point() for tensor in batches.tensors(value))


def _parts(keys: list[Any]) -> str:
    return ", ".join(f"batch[{key!r}]" for key in keys)
