"""Two oracles: the user's own training step tells whether it is mixed rightly, whatever mixes it.

- **swap** (eval mode): when the state at layer k and the targets are permuted alike, the loss must stay as it is. Else
  something reaches the loss past layer k and the targets: a second label, a teacher, samples sorted inside forward.
- **pair** (training mode, the same random numbers): the loss of the mixed batch must be
  ``lam * L(y) + (1 - lam) * L(y[partners])``, each with plain labels. Else the superposition could not follow.

Both compare values and gradients (of the last modules before the loss), and run on ghosts: nothing of the user's is
changed. Neither has a verdict where it has no power, that is, where a mistake would not show either.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_manifold_mixup._step import batch as batches
from lightning_manifold_mixup._step.criteria import criterion_hooks, plain_metrics
from lightning_manifold_mixup._step.devices import float64
from lightning_manifold_mixup._step.ghost import (
    Backwards,
    ghost_of,
    isolated,
    random_states,
    same_random_states,
)
from lightning_manifold_mixup._step.reads import Reads
from lightning_manifold_mixup._step.step import Call, How, Site, loss_of
from lightning_manifold_mixup._step.targets import MixingError, Reader, Superposition, plain
from lightning_manifold_mixup.mixing import Mix

# How many modules before the loss have their gradients compared: heads.
_HEADS = 3
# A finding of the pair oracle: no loss has seen the labels.
UNUSED = "no loss with a gradient used the labels"


class Verdict(Enum):
    """What an oracle says."""

    PASSED = "passed"
    FAILED = "failed"
    NO_POWER = "no power"  # a mistake would not show in this batch: to be made again
    UNDECIDED = "undecided"  # the step gives no answer that could be compared


Mixes = tuple[Mix, ...]


@dataclass(frozen=True)
class Finding:
    """A verdict, and in a few words why."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one run of the step gave.

    Attributes:
        loss: float64, 0-d; the sum of all losses under manual optimization. None if the step skipped the batch.
        gradient: of the loss by the parameters of the last modules, as one vector.
        precision: the relative accuracy of the loss.
        random: the states of the random generators at the end.
        used: whether the loss has used the labels in superposition.
        inspected: whether the step knows of the superposition, and has asked for one of the labellings.
        beside: the gradient by one more parameter, where it was asked for.
    """

    loss: Tensor | None
    gradient: Tensor
    precision: float
    random: Any
    used: bool = True
    inspected: bool = False
    beside: Tensor | None = None


@dataclass
class Trials:
    """Runs the user's training step on ghosts, under chosen conditions.

    Attributes:
        module: the LightningModule, which stays as it is.
        call: what its training step was called with.
        unfit: names of modules that were taken for criteria, and are none.
        fired: names of the criteria, modules that were handed labels in superposition.
        superposed: whether any run had labels in superposition.
    """

    module: Any
    call: Call
    unfit: set[str] = field(default_factory=set)
    fired: set[str] = field(default_factory=set)
    superposed: bool = False

    def run(
        self,
        site: Site | None = None,
        *,
        states: Mixes = (),
        labels: Mixes = (),
        how: How = "labels",
        train: bool = True,
        also: Iterable[Any] = (),
        around: Callable[[nn.Module, ExitStack], None] | None = None,
        reader: Reader | None = None,
        seed: int | None = None,
        beside: nn.Parameter | None = None,
    ) -> Outcome:
        """The user's step on a ghost.

        Args:
            site: where states are mixed; None leaves the batch as it is.
            states: how they are mixed, for each group of samples; none leaves them as they are.
            labels: how the targets are.
            how: integer labels; see :meth:`Site.mixed`.
            train: in training mode, or in eval mode without autocast.
            also: keys of further parts of the batch, which are permuted like the labels.
            around: called with the ghost, to hook it.
            reader: of host reads; see :class:`Superposition`.
            seed: of the random numbers; None goes on with those of the module.
            beside: one more parameter to take the gradient by.
        """
        ghost = ghost_of(self.module)
        batch, superposition = self.call.batch, None
        if not train:
            ghost.eval()
        with ExitStack() as stack:
            stack.enter_context(isolated(self.module))
            if not train:
                stack.enter_context(torch.autocast(self._device, enabled=False))
            if seed is not None:
                _seed_all(seed)
            plain_metrics(ghost, stack)
            if site is not None:
                if labels and how == "superposed":
                    superposition = Superposition(labels[0].lam).to(labels[0].partners.device)
                    superposition.reader = reader
                    stack.callback(superposition.close)
                batch = site.mixed(batch, states, labels, how, superposition, permuted=not train)
                for key in also:
                    batch = batches.replaced(batch, key, batches.get(batch, key)[labels[0].partners])
                if states:
                    site.hook(ghost, states, stack, in_eval=not train)
            hooks = criterion_hooks(ghost, without=self.unfit)
            heads = _Heads(ghost, stack)
            if around is not None:
                around(ghost, stack)
            backwards = stack.enter_context(Backwards()) if not ghost.automatic_optimization else None
            output = self.call.of(ghost.training_step, batch)
            states_after = random_states(self.module.parameters())
            losses = [loss_of(output)] if backwards is None else [plain(loss) for loss in backwards.losses]
            used = superposition is None or superposition.used or not superposition.holds_labels
            outcome = heads.outcome([plain(loss) for loss in losses if loss is not None], states_after, used, beside)
            if superposition is not None and superposition.inspected:
                outcome = replace(outcome, inspected=True)
        self.superposed |= superposition is not None and superposition.holds_labels
        self.unfit |= {name for name, hook in hooks.items() if hook.unfit}
        self.fired |= {name for name, hook in hooks.items() if hook.fired and not hook.unfit}
        return outcome

    @property
    def _device(self) -> str:
        return str(self.module.device.type)


class _Heads:
    """The last modules with parameters that a forward pass calls: the gradients that tell of the loss alone."""

    def __init__(self, ghost: nn.Module, stack: ExitStack) -> None:
        self._called: dict[nn.Module, None] = {}
        self._ghost = ghost
        for module in ghost.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(self._note).remove)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._called.pop(module, None)
        self._called[module] = None

    def outcome(self, losses: list[Tensor], random: Any, used: bool, beside: nn.Parameter | None) -> Outcome:
        """What the run gave."""
        if not losses:
            return Outcome(None, torch.zeros(0), 0.0, random)
        loss = torch.stack([float64(loss).sum() for loss in losses]).sum()
        modules = list(self._called)[-_HEADS:] or [self._ghost]
        parameters = [p for m in modules for p in m.parameters(recurse=m is self._ghost) if p.requires_grad]
        gradient = torch.zeros(1, dtype=torch.float64)
        more = None
        if loss.requires_grad and beside is not None:
            (more,) = torch.autograd.grad(loss, [beside], allow_unused=True, retain_graph=True)
        if loss.requires_grad and parameters:
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradient = torch.cat([float64(g.detach()).flatten() for g in found if g is not None] or [gradient])
        dtypes = {loss.dtype for loss in losses} | {parameter.dtype for parameter in parameters}
        if torch.is_autocast_enabled(device := losses[0].device.type):
            dtypes.add(torch.get_autocast_dtype(device))
        precision = max(torch.finfo(dtype).eps for dtype in dtypes)
        return Outcome(loss.detach(), gradient.to(loss.device), precision, random, used, beside=more)


class _Comparison:
    """How far two outcomes are apart, measured against a third that is wrong on purpose."""

    def __init__(self, got: Outcome, wanted: Outcome, wrong: Outcome) -> None:
        self.got, self.wanted, self.wrong = got, wanted, wrong
        precision = max(got.precision, wanted.precision, wrong.precision)
        self.value = self._compare("loss", 100 * precision)
        self.gradient = self._compare("gradient", 1000 * precision)

    def _compare(self, what: str, accuracy: float) -> tuple[bool, bool]:
        """Whether both agree, and whether that means anything."""
        got, wanted, wrong = (getattr(outcome, what) for outcome in (self.got, self.wanted, self.wrong))
        if got.shape != wanted.shape or got.shape != wrong.shape:
            return got.shape == wanted.shape, got.shape != wanted.shape
        scale = max(float(wanted.norm()), float(wrong.norm()), 1e-12)
        power, gap = float((wrong - wanted).norm()), float((got - wanted).norm())
        tolerance = max(accuracy * scale, 1e-3 * power)
        return gap <= tolerance, power > 2 * tolerance

    @property
    def agree(self) -> bool:
        return self.value[0] and self.gradient[0]

    @property
    def power(self) -> bool:
        return self.value[1] or self.gradient[1]


def swap(trials: Trials, site: Site, mixes: Mixes, plain_run: Outcome, wrong: Outcome | None, train: bool) -> Finding:
    """The swap oracle at one layer.

    Args:
        trials: the step.
        site: the layer.
        mixes: a permutation of each group of samples, with lam 0.
        plain_run: the step on the batch as it is.
        wrong: the step with the states permuted and the labels as they are; None makes it.
        train: whether the runs are in training mode (where the step cannot run in eval mode).
    """
    wrong = wrong or trials.run(site, states=mixes, train=train)
    swapped = trials.run(site, states=mixes, labels=mixes, how="partners", train=train)
    if plain_run.loss is None or swapped.loss is None or wrong.loss is None:
        return Finding(Verdict.NO_POWER)
    if not bool(torch.isfinite(plain_run.loss)):
        return Finding(Verdict.UNDECIDED, "the loss is not finite")
    comparison = _Comparison(swapped, plain_run, wrong)
    if comparison.agree:
        return Finding(Verdict.PASSED if comparison.power else Verdict.NO_POWER)
    again = trials.run(train=train, seed=20190528)
    if again.loss is None or not _Comparison(again, plain_run, wrong).value[0]:
        return Finding(Verdict.UNDECIDED, "the loss of the plain batch changes with the random numbers")
    if comparison.value[0] and not _Comparison(again, plain_run, wrong).gradient[0]:
        return Finding(Verdict.UNDECIDED, "the gradient of the plain batch changes with the random numbers")
    return Finding(
        Verdict.FAILED,
        f"when the states at {site.layer!r} and the targets are permuted alike, the loss changes from "
        f"{float(plain_run.loss):.6g} to {float(swapped.loss):.6g}",
    )


def pair(trials: Trials, site: Site, mixes: Mixes) -> tuple[Finding, int]:
    """The pair oracle at one layer.

    Args:
        trials: the step.
        site: the layer.
        mixes: a draw for each group of samples, with one lam.

    Returns:
        The finding, and how many values that depend on the labels are read on the host, without an effect on the loss.
    """
    labels = trials.run(site, states=mixes, labels=mixes, how="labels")
    partners = trials.run(site, states=mixes, labels=mixes, how="partners")
    if labels.loss is None or partners.loss is None:
        return Finding(Verdict.NO_POWER), 0
    if labels.gradient.shape != partners.gradient.shape:
        return Finding(Verdict.FAILED, "which parameters are used depends on the labels"), 0
    lam = float64(mixes[0].lam).to(labels.loss.device)
    wanted = Outcome(
        lam * labels.loss + (1 - lam) * partners.loss,
        lam * labels.gradient + (1 - lam) * partners.gradient,
        max(labels.precision, partners.precision),
        labels.random,
    )
    asked = 0
    for answers in ((0,), (1,), (-1,), (1, -1), (-1, 1)):  # as it is; then as it might be in another batch
        reads = Reads(answers)
        unfit = len(trials.unfit)
        try:
            with reads.watch():
                got = trials.run(site, states=mixes, labels=mixes, how="superposed", reader=reads)
            if len(trials.unfit) > unfit:  # modules that are no criteria have been taken for some
                reads = Reads(answers)
                with reads.watch():
                    got = trials.run(site, states=mixes, labels=mixes, how="superposed", reader=reads)
        except Exception as error:  # whatever the user's code makes of tensors that it was not written for
            return Finding(Verdict.FAILED, _first_line(error)), asked
        if got.inspected:
            return Finding(Verdict.UNDECIDED, "the step asks for `.labels`, `.partners` or `.lam` itself"), asked
        finding = _compared(got, wanted, labels, partners)
        if finding.verdict is Verdict.FAILED and answers != (0,):
            return Finding(Verdict.FAILED, "Python code reads a value that depends on the labels, and uses it"), asked
        if reads.returned:  # its effect may not show in this batch, as where a class is missing
            return Finding(Verdict.FAILED, "tensors are made of labels that Python code or NumPy has read"), asked
        if finding.verdict is not Verdict.PASSED or not reads.asked:
            return finding, asked
        asked = max(asked, reads.asked)
    return finding, asked


def _compared(got: Outcome, wanted: Outcome, labels: Outcome, partners: Outcome) -> Finding:
    if got.loss is None or wanted.loss is None:
        return Finding(Verdict.FAILED, "the step skipped the mixed batch, and no other")
    comparisons = [_Comparison(got, wanted, wrong) for wrong in (labels, partners)]
    power = any(comparison.power for comparison in comparisons)
    if not all(comparison.agree for comparison in comparisons):
        if all(comparison.value[0] for comparison in comparisons):
            return Finding(Verdict.FAILED, "the gradient of the loss is not lam * that of L(y) + (1 - lam) * ...")
        formula = f"lam * L(y) + (1 - lam) * L(y[partners]) is {float(wanted.loss):.6g}"
        return Finding(Verdict.FAILED, f"the loss is {float(got.loss):.6g} where {formula}")
    if not same_random_states(got.random, labels.random):
        return Finding(Verdict.FAILED, "random numbers are drawn where the labels go")
    if not power:
        return Finding(Verdict.NO_POWER, "" if got.used else UNUSED)
    return Finding(Verdict.PASSED)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, MixingError) else f"{type(error).__name__}: {text}"
