"""Two oracles, which find out by the user's own training step whether it is mixed correctly.

- **swap** (eval mode): when the state at layer k and the targets are permuted alike, the loss must stay as it is. Else
  something reaches the loss past layer k and the targets: a second label, a teacher, samples sorted inside forward.
- **pair** (training mode, the same random numbers): the loss of the mixed batch must be
  ``lam * L(y) + (1 - lam) * L(y[partners])``, each with plain labels. Else the superposition could not follow.

Both compare values and gradients (of the last modules before the loss), and run on ghosts: nothing of the user's is
changed. Neither has a verdict where it has no power, that is, where a mistake would not show either. The pair oracle is
unsure where a mistake would look like the rounding of half precision, which on a GPU may be another in each run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from lightning_manifold_mixup._step.check.random_states import same_random_states
from lightning_manifold_mixup._step.check.trials import Mixes, Outcome, Trials
from lightning_manifold_mixup._step.devices import float64
from lightning_manifold_mixup._step.labels.reads import Line, Reads
from lightning_manifold_mixup._step.labels.targets import MixingError
from lightning_manifold_mixup._step.step import Site

# Of random numbers whose effect may be small, one draw may look like another.
_SEEDS = range(2019, 2025)
# A finding of the pair oracle: no loss has seen the labels.
UNUSED = "no loss with a gradient used the labels"
# What it says where it is unsure.
ROUNDING = "the loss is off by more than its own rounding, if not by more than that of the states it is computed from"


class Verdict(Enum):
    """What an oracle says."""

    PASSED = "passed"
    FAILED = "failed"
    NO_POWER = "no power"  # a mistake would not show in this batch: to be made again
    UNSURE = "unsure"  # as far off as the rounding of half precision may bring it
    UNDECIDED = "undecided"  # the step gives no answer that could be compared


@dataclass(frozen=True)
class Finding:
    """A verdict, and in a few words why."""

    verdict: Verdict
    reason: str = ""


class Comparison:
    """How far two outcomes are apart, measured against a third that is wrong on purpose.

    Args:
        got: by the way that is tested.
        wanted: by another.
        wrong: what a mistake would give.
        same_states: whether all three come of the same states, so that their losses differ by the rounding of the loss
            alone, also where the states are coarse.

    Attributes:
        same_loss: whether the two losses agree.
        same_gradient: whether their gradients do.
        agree: whether both do.
        power: whether the third differs, so that a mistake would show.
    """

    def __init__(self, got: Outcome, wanted: Outcome, wrong: Outcome, *, same_states: bool = False) -> None:
        self.got, self.wanted, self.wrong = got, wanted, wrong
        coarse = max(got.precision, wanted.precision, wrong.precision)
        own = max(got.own, wanted.own, wrong.own)
        value = max(_accuracy(own, 100, 4), coarse / 16) if same_states else _accuracy(coarse, 100, 4)
        self.same_loss, loss_tells = self._compare("loss", value)
        self.same_gradient, gradient_tells = self._compare("gradient", _accuracy(coarse, 1000, 8))
        self.agree = self.same_loss and self.same_gradient
        self.power = loss_tells or gradient_tells

    def _compare(self, what: str, accuracy: float) -> tuple[bool, bool]:
        """Whether both agree, and whether that means anything."""
        got, wanted, wrong = (getattr(outcome, what) for outcome in (self.got, self.wanted, self.wrong))
        if got.shape != wanted.shape or got.shape != wrong.shape:
            return got.shape == wanted.shape, got.shape != wanted.shape
        scale = max(float(wanted.norm()), float(wrong.norm()), 1e-12)
        power, gap = float((wrong - wanted).norm()), float((got - wanted).norm())
        tolerance = max(accuracy * scale, 1e-3 * power)
        return gap <= tolerance, power > 2 * tolerance


def _accuracy(precision: float, many: float, few: float) -> float:
    """Return what rounding may add up to: where numbers are coarse, little of it, or nothing would show."""
    return precision * (many if precision < 1e-5 else few)


def swap(trials: Trials, site: Site, mixes: Mixes, plain_run: Outcome, wrong: Outcome | None) -> Finding:
    """Ask the swap oracle about one layer.

    Args:
        trials: the step.
        site: the layer.
        mixes: a permutation of each group of samples, with lam 0.
        plain_run: the step on the batch as it is.
        wrong: the step with the states permuted and the labels as they are; None makes it.
    """
    wrong = wrong or trials.run(site, states=mixes)
    swapped = trials.run(site, states=mixes, labels=mixes, how="partners")
    if plain_run.loss is None or swapped.loss is None or wrong.loss is None:
        return Finding(Verdict.NO_POWER)
    if not bool(torch.isfinite(plain_run.loss)):
        return Finding(Verdict.UNDECIDED, "the loss is not finite")
    comparison = Comparison(swapped, plain_run, wrong)
    if comparison.agree:
        return Finding(Verdict.PASSED if comparison.power else Verdict.NO_POWER)
    for seed in _SEEDS:
        again = trials.run(seed=seed)
        if again.loss is None or not Comparison(again, plain_run, wrong).same_loss:
            return Finding(Verdict.UNDECIDED, "the loss of the plain batch changes with the random numbers")
        if comparison.same_loss and not Comparison(again, plain_run, wrong).same_gradient:
            return Finding(Verdict.UNDECIDED, "the gradient of the plain batch changes with the random numbers")
    return Finding(
        Verdict.FAILED,
        f"when the states at {site.layer!r} and the targets are permuted alike, the loss changes from "
        f"{float(plain_run.loss):.6g} to {float(swapped.loss):.6g}",
    )


def pair(trials: Trials, site: Site, mixes: Mixes) -> tuple[Finding, set[Line]]:
    """Ask the pair oracle about one layer.

    Args:
        trials: the step.
        site: the layer.
        mixes: a draw for each group of samples, with one lam.

    Returns:
        The finding, and the lines of code that read values which depend on the labels; unless it has failed, without
        an effect on the loss.
    """
    labels = trials.run(site, states=mixes, labels=mixes, how="labels")
    partners = trials.run(site, states=mixes, labels=mixes, how="partners")
    if labels.loss is None or partners.loss is None:
        return Finding(Verdict.NO_POWER), set()
    if labels.gradient.shape != partners.gradient.shape:
        return Finding(Verdict.FAILED, "which parameters are used depends on the labels"), set()
    lam = float64(mixes[0].lam).to(labels.loss.device)
    wanted = Outcome(
        lam * labels.loss + (1 - lam) * partners.loss,
        lam * labels.gradient + (1 - lam) * partners.gradient,
        max(labels.precision, partners.precision),
        labels.random,
        own=max(labels.own, partners.own),
    )
    lines: set[Line] = set()
    for answers in ((0,), (1,), (-1,), (1, -1), (-1, 1)):  # as it is; then as it might be in another batch
        reads = Reads(answers)
        unfit = len(trials.seen.unfit)
        try:
            with reads.watch():
                got = trials.run(site, states=mixes, labels=mixes, how="superposed", reader=reads)
            if len(trials.seen.unfit) > unfit:  # a module was taken for a criterion and is none
                reads = Reads(answers)
                with reads.watch():
                    got = trials.run(site, states=mixes, labels=mixes, how="superposed", reader=reads)
        except Exception as error:  # any error of user code that was not written for such tensors
            return Finding(Verdict.FAILED, _first_line(error)), lines
        lines |= reads.lines
        if got.inspected:
            return Finding(Verdict.UNDECIDED, "the step asks for `.labels`, `.partners` or `.lam` itself"), lines
        if got.late:  # its effect may not show in this batch
            return Finding(Verdict.FAILED, "code that runs in the backward pass reads the labels"), lines
        finding = _compared(got, wanted, labels, partners)
        if finding.verdict is Verdict.FAILED and answers == (0,):
            again = trials.run(site, states=mixes, labels=mixes, how="labels")
            if again.loss is None or not Comparison(again, labels, partners, same_states=True).agree:
                return Finding(Verdict.UNDECIDED, "the step gives another loss when it runs again"), lines
        if finding.verdict is Verdict.FAILED and answers != (0,):
            return Finding(Verdict.FAILED, "Python code reads a value that depends on the labels, and uses it"), lines
        if reads.returned:  # its effect may not show in this batch, if a class is missing
            return Finding(Verdict.FAILED, "tensors are made of labels that Python code or NumPy has read"), lines
        if finding.verdict is not Verdict.PASSED or not reads.asked:
            return finding, lines
    return finding, lines


def _compared(got: Outcome, wanted: Outcome, labels: Outcome, partners: Outcome) -> Finding:
    if got.loss is None or wanted.loss is None:
        return Finding(Verdict.FAILED, "the step skipped the mixed batch, and no other")
    comparisons = [Comparison(got, wanted, wrong, same_states=True) for wrong in (labels, partners)]
    power = any(comparison.power for comparison in comparisons)
    if not all(comparison.agree for comparison in comparisons):
        if all(Comparison(got, wanted, wrong).agree for wrong in (labels, partners)):
            return Finding(Verdict.UNSURE, ROUNDING)
        if all(comparison.same_loss for comparison in comparisons):
            return Finding(Verdict.FAILED, "the gradient of the loss is not lam * that of L(y) + (1 - lam) * ...")
        formula = f"lam * L(y) + (1 - lam) * L(y[partners]) is {float(wanted.loss):.6g}"
        return Finding(Verdict.FAILED, f"the loss is {float(got.loss):.6g} where {formula}")
    if not same_random_states(got.random, labels.random):
        return Finding(Verdict.FAILED, "random numbers are drawn where the labels go")
    if not power:
        return Finding(Verdict.NO_POWER, "" if got.used else UNUSED)
    return Finding(Verdict.PASSED)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if isinstance(error, MixingError) else f"{type(error).__name__}: {text}"
